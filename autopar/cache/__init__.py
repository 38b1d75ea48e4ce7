"""Compiled programs kept from launch to launch, and made once for all ranks of a machine."""
