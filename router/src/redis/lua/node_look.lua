local known = 0
