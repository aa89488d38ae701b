"""The floor: checks, hashes, chance, files and progress that every other room stands on."""
