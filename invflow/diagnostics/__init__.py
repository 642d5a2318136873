"""How exactly a chain runs backwards, and pictures of what it does."""
