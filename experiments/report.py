def report(results, methods, figures, quick=False): return str(list(results["runs"]))
