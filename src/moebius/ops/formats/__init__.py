"""Low-precision products: number formats emulated bit by bit on any device, and products in them.

`format.py` is the seam (one file a format), `grid.py` the values an element can take, `quantise.py`
rounds tensors to them, `product.py` multiplies forward and backward. Formats: OCP Microscaling
Formats 1.0 (mxfp8, mxfp4), NVIDIA's NVFP4, and fp8 with a scale a row (Micikevicius et al. 2022).
"""

from moebius.ops.formats.format import Format
from moebius.ops.formats.product import Product, choose, multiply
from moebius.ops.formats.quantise import Quantised, quantise
from moebius.ops.formats.shares import Watch

__all__ = ["Format", "Product", "Quantised", "Watch", "choose", "multiply", "quantise"]
