"""What bench_family.py and bench_family_cuda.py measure: a module for each page of docs/ about the
family, with cases() for the CPU and gpu_cases() for a GPU.
"""
