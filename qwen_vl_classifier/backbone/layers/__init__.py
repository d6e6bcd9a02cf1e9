"""How the layers of both towers compute: packed rows, and the fast paths by device."""
