"""The routes, one module for each purpose, with the requests and answers of each."""
