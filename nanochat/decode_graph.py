class DecodeGraphs: pass
