"""Requests on one set of weights: the owner of the step loop."""
