import dataclasses,hashlib,json
def to_dict(c): return dataclasses.asdict(c)
def digest(c): return hashlib.sha256(json.dumps(to_dict(c),sort_keys=True,default=str).encode()).hexdigest()
def freeze(t,m): return t(**m)
