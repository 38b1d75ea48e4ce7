"""Which meshes and plans fit a number of devices: prices of a block, closed forms over them, and compiled programs."""
