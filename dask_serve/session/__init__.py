"""What calls and sessions need besides: whom to ask, the refs among arguments, waiting for results."""
