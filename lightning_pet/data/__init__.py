"""Ready LightningDataModules."""
