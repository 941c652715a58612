"""Tests; they mirror the package's tree."""
