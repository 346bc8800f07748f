"""Attacks on the package: damaged files, kills, full disks, hostile names, operators' extremes."""
