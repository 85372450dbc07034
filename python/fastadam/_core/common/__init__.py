"""What every part uses: checks of arguments, error texts, names, types, reprs."""
