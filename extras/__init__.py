"""One script per job: `python -m extras.NAME`. Each says in its first lines what it does."""
