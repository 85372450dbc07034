"""Tables whose untouched rows wait for their steps."""
