"""Rows of pictures and text from anywhere, checked as they are loaded: `loading` reads them into `Example`s."""
