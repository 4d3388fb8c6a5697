def rebuild():
    return []
