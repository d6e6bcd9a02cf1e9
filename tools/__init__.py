"""What the project is made with. Not part of the package."""
