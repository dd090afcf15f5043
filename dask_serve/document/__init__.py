"""Documents: the YAML that says which applications run, with which options."""
