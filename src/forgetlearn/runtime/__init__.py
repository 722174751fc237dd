"""One process or several, weights split over them, and how they are interrupted."""
