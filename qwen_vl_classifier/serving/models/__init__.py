"""What is served: classifiers by name and version, and how they change while requests are answered."""
