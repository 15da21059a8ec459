"""What did it learn, as a page? Gathers the analysis of an adapter and writes one HTML page."""
