"""Reports: what a run is, how it was trained and how accurately it runs backwards, as one HTML page."""
