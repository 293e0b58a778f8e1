import sys, tempfile, time, traceback, warnings
warnings.filterwarnings("ignore")
from pathlib import Path
from tests.bridge.rows import ROWS
from tests.bridge.measure import measure
want=sys.argv[1:]
for row in ROWS:
    if want and not any(w in row.label for w in want): continue
    t=time.time()
    try:
        with tempfile.TemporaryDirectory() as d: r=measure(row, Path(d))
        print(row.label, {k:(round(v,6) if isinstance(v,float) else v) for k,v in r.items()}, f"{time.time()-t:.0f}s", flush=True)
    except Exception as e:
        print("!!", row.label, type(e).__name__, str(e)[:300], flush=True)
        tb=traceback.extract_tb(e.__traceback__)
        for f in tb[-6:]: print("      ", f.filename.split('/')[-1], f.lineno, f.line)
