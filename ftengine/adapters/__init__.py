"""ftengine inside the training loops of others: torch's ``DataLoader``, MONAI's ``Compose``. Users' code; no part of ftengine imports it."""
