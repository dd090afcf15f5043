"""How fast dask_serve is beside what it could be compared with: ``make bench``."""
