"""What travels to workers: code and bound arguments by value, and the revision that names them."""
