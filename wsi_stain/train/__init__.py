"""Training of the nets that room 3 loads: one file is one stage is one loss."""
