"""Nineteen corruptions at five severities, batched on the device."""
