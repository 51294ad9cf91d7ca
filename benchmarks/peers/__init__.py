"""The tools we compare with: how their environments are made, and what runs in them."""
