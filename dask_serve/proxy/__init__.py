"""The HTTP proxies: processes of their own that import neither Dask nor distributed."""
