"""Small models that hold given facts, and the demo on a made-up world."""
