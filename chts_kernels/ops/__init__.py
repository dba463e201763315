"""The operations, one folder each: public function with checks, reference, kernels."""
