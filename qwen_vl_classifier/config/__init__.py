"""Every option of every verb, declared once with its default and its help: one file for each verb."""
