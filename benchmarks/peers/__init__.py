"""dask_serve beside other servers, each in an environment of its own: ``make bench-peers``."""
