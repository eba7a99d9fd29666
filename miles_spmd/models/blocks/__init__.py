"""Descriptions of the parts of a layer, from which trainer and engine build what they compute. Imports no torch."""
