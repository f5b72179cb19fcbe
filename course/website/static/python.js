/* What Python does and JavaScript does otherwise, for modules translated by course/website/javascript.py. */
"use strict";

const python = {
  math: { isfinite: Number.isFinite, inf: Infinity },
  // types, as isinstance asks for them
  float: "float",
  Real: "Real",

  bool: (x) => (Array.isArray(x) ? x.length > 0 : python.isDict(x) ? Object.keys(x).length > 0 : Boolean(x)),
  isDict: (x) => x !== null && typeof x === "object" && Object.getPrototypeOf(x) === Object.prototype,
  isinstance(x, kind) {
    if (Array.isArray(kind)) return kind.some((each) => python.isinstance(x, each));
    if (kind === python.bool) return typeof x === "boolean";
    if (kind === python.int) return Number.isInteger(x) || typeof x === "boolean";
    if (kind === python.float || kind === python.Real) return typeof x === "number";
    if (kind === python.str) return typeof x === "string";
    if (kind === python.list || kind === python.tuple) return Array.isArray(x);
    return kind === python.dict ? python.isDict(x) : x instanceof kind;
  },

  list: (x) => (Array.isArray(x) ? [...x] : typeof x === "string" ? [...x] : Object.keys(x)),
  tuple: (x) => python.list(x),
  dict: (x = {}) => (Array.isArray(x) ? Object.fromEntries(x) : { ...x }),
  int: Math.trunc,
  abs: Math.abs,
  str: (x) => python.format(x, "", false),
  len: (x) => python.list(x).length,
  sum: (x, start = 0) => python.list(x).reduce((a, b) => a + Number(b), start),
  all: (x) => python.list(x).every(python.bool),
  any: (x) => python.list(x).some(python.bool),
  map: (f, x) => python.list(x).map((each) => f(each)),
  zip: (...xs) => python.list(xs[0]).map((_, i) => xs.map((x) => x[i])).slice(0, Math.min(...xs.map((x) => x.length))),
  range: (a, b) => Array.from({ length: Math.max(0, b === undefined ? a : b - a) }, (_, i) => (b === undefined ? i : a + i)),
  enumerate: (x, start = 0) => python.list(x).map((each, i) => [i + start, each]),
  sorted: (x) => python.list(x).sort((a, b) => (a < b ? -1 : a > b ? 1 : 0)),
  getattr: (x, name, otherwise) => (x[name] === undefined ? otherwise : x[name]),
  best(better, xs, key) {
    const all = xs.length === 1 ? python.list(xs[0]) : xs;
    return all.reduce((a, b) => (better(key(b), key(a)) ? b : a));
  },
  max: (...xs) => python.best((b, a) => b > a, xs, (x) => x),
  min: (...xs) => python.best((b, a) => b < a, xs, (x) => x),

  plus: (a, b) => (Array.isArray(a) ? [...a, ...b] : typeof a === "string" ? a + b : Number(a) + Number(b)),
  times(a, b) {
    if (typeof b === "string" || Array.isArray(b)) [a, b] = [b, a];
    if (typeof a === "string") return a.repeat(Math.max(0, Number(b)));
    return Array.isArray(a) ? Array.from({ length: Number(b) }, () => a).flat() : a * b;
  },
  floor: (a, b) => Math.floor(a / b),
  mod: (a, b) => a - b * Math.floor(a / b),
  or: (a, b) => (python.isDict(a) ? { ...a, ...b } : typeof a === "boolean" ? a || b : a | b),
  both: (a, b) => (python.bool(a) ? b() : a),
  either: (a, b) => (python.bool(a) ? a : b()),
  has: (x, y) => (python.isDict(x) ? Object.hasOwn(x, y) : Array.isArray(x) ? x.some((each) => python.equal(each, y)) : x.includes(y)),
  equal: (a, b) =>
    Array.isArray(a) && Array.isArray(b)
      ? a.length === b.length && a.every((each, i) => python.equal(each, b[i]))
      : a === b || (typeof a === "boolean" && Number(a) === b) || (typeof b === "boolean" && a === Number(b)),

  method(x, name, given) {
    const known = {
      items: () => Object.entries(x),
      values: () => Object.values(x),
      keys: () => Object.keys(x),
      get: (key, otherwise = null) => (Object.hasOwn(x, key) ? x[key] : otherwise),
      pop(key, otherwise) {
        if (!Object.hasOwn(x, key) && otherwise === undefined) throw python.error("KeyError", key);
        const value = Object.hasOwn(x, key) ? x[key] : otherwise;
        delete x[key];
        return value;
      },
      join: (parts) => python.list(parts).join(x),
      endswith: (ends) => [ends].flat().some((end) => x.endsWith(end)),
      startswith: (starts) => [starts].flat().some((start) => x.startsWith(start)),
    };
    return typeof x === "string" || python.isDict(x) ? known[name](...given) : x[name](...given);
  },
  named(names, f) {
    Object.defineProperty(f, "parameters", { value: names });
    return f;
  },
  call(self, f, given, named) {
    if (f === python.max || f === python.min) return python.best((b, a) => (f === python.max ? b > a : b < a), given, named.key);
    const all = [...given];
    for (const [name, value] of Object.entries(named)) {
      const place = f.parameters.indexOf(name);
      if (place < 0) throw python.error("TypeError", `${f.name} has no parameter ${name}`);
      all[place] = value;
    }
    return /^class\b/.test(Function.prototype.toString.call(f)) ? new f(...all) : f.apply(self, all);
  },
  error: (kind, message) => Object.assign(new Error(message), { name: kind }),

  /** `x` as Python's format(x, shape) writes it: width, thousands, decimals. */
  format(x, shape, quoted) {
    const plain = x === null || x === undefined ? "None" : x === true ? "True" : x === false ? "False" : String(x);
    if (quoted) return typeof x === "string" ? `'${x}'` : plain;
    const [, width, comma, decimals, kind] = /^(\d+)?(,)?(?:\.(\d+))?([dfs])?$/.exec(shape);
    let text = plain;
    if (typeof x === "number") {
      text = kind === "f" ? python.fixed(x, Number(decimals ?? 6)) : String(x);
      if (comma) text = text.replace(/^(-?\d+)/, (whole) => whole.replace(/\B(?=(\d{3})+$)/g, ","));
    }
    if (!width) return text;
    return typeof x === "number" ? text.padStart(Number(width)) : text.padEnd(Number(width));
  },
  /** Rounded as Python rounds: what lies in the middle goes to the even neighbour. */
  fixed(x, decimals) {
    const scaled = x * 10 ** decimals;
    const below = Math.floor(scaled);
    return scaled - below === 0.5 && below % 2 === 0 ? (below / 10 ** decimals).toFixed(decimals) : x.toFixed(decimals);
  },
};
