"""The "Serve" page of Dask's dashboard. Only `pages` and what it imports need bokeh."""
