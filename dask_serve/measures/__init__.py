"""What is counted of requests, where it is counted, and how counts of many processes become one. No I/O, no clock."""
