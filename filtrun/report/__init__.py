"""What is made of records: tables, claims with their evidence, human units."""
