"""The data wing: what users hand in becomes packed batches on the mesh.

samples → tokenization → packing → batches, with the report beside them; the types
that the rooms share are in `types.py`. Only `batches.py` knows JAX.
"""
