"""From run directories or tables to scaling laws; numpy and scipy only, no torch."""
