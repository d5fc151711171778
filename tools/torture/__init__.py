"""What is promised, under attack: kills, damage, hostile input, refused writes."""
