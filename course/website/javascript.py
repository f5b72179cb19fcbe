"""Python to JavaScript, for modules that only calculate: the memory formulas of ``reference`` run in a reader's browser as they stand.

Known is what such modules are made of: functions, dataclasses with properties and class methods, comprehensions, dictionaries with strings
for keys, formatted strings. Anything else is refused by file and line, so that a page never calculates something else than the module.
What JavaScript does differently (truth of an empty list, ``|`` of dictionaries, ``%`` of negative numbers …) is in ``static/python.js``.
"""

import ast
import json
from pathlib import Path

from course.units import CourseError

_BUILTINS = frozenset("sum min max len all any map list tuple dict sorted zip range enumerate isinstance getattr bool str int abs".split())
_TYPES = {"bool", "int", "float", "str", "Real"}
_METHODS = frozenset(
    "items values keys get pop join endswith startswith".split()
)  # of dictionaries and strings, which are JavaScript's own
_RESERVED = frozenset("new var function delete default switch case this void typeof let const export enum super catch throw do".split())
_COMPARED = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Is: "===", ast.IsNot: "!=="}


def translate(sources: dict[str, Path], exported: str) -> str:
    """JavaScript that defines ``modules``, an object from name to names, of the Python modules ``sources``.

    Args:
        sources: dotted name -> file, those that others import first.
        exported: the name of the variable that gets the modules.

    Raises:
        CourseError: a module uses something that has no translation here; the message names the place.
    """
    trees = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in sources.items()}
    classes = {node.name for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef)}
    bodies = [_Module(name, sources[name], frozenset(sources), classes).module(tree) for name, tree in trees.items()]
    return f"const {exported} = (() => {{\nconst modules = {{}};\n" + "\n".join(bodies) + "\nreturn modules;\n})();\n"


class _Module:
    """Translates one module; a method for a kind of node, named after it."""

    def __init__(self, name: str, path: Path, known: frozenset[str], classes: set[str]):
        self.name, self.path, self.known, self.classes = name, path, known, classes

    def module(self, tree: ast.Module) -> str:
        names = [name for node in tree.body for name in self.bound(node)]
        body = "\n".join(self.statement(node) for node in tree.body)
        declared = f"let {', '.join(map(_safe, dict.fromkeys(names)))};\n" if names else ""
        return f'modules["{self.name}"] = (() => {{\n{declared}{body}\nreturn {{ {", ".join(map(_safe, dict.fromkeys(names)))} }};\n}})();'

    def bound(self, node: ast.stmt) -> list[str]:
        """The names that a statement of a module binds and that others may import."""
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            return [node.name]
        if isinstance(node, ast.ImportFrom) and self.imports(node):
            return [alias.asname or alias.name for alias in node.names]
        return _assigned([node]) if isinstance(node, (ast.Assign, ast.AnnAssign)) else []

    def imports(self, node: ast.ImportFrom) -> bool:
        return node.module in self.known or any(f"{node.module}.{alias.name}" in self.known for alias in node.names)

    def refuse(self, node: ast.AST, why: str = ""):
        what = why or f"{type(node).__name__} has no translation to JavaScript in course/website/javascript.py"
        raise CourseError(f"{self.path}, line {getattr(node, 'lineno', '?')}: {what}")

    # statements

    def statement(self, node: ast.stmt) -> str:
        translator = getattr(self, f"do_{type(node).__name__}", None)
        return translator(node) if translator else self.refuse(node)

    def block(self, body: list[ast.stmt]) -> str:
        return "{\n" + "\n".join(map(self.statement, body)) + "\n}"

    def do_ImportFrom(self, node: ast.ImportFrom) -> str:
        if not self.imports(node):
            return ""  # types, for annotations
        lines = []
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            found = f'modules["{whole}"]' if whole in self.known else f'modules["{node.module}"].{_safe(alias.name)}'
            lines.append(f"{_safe(alias.asname or alias.name)} = {found};")
        return "\n".join(lines)

    def do_Import(self, node: ast.Import) -> str:
        return "" if all(alias.name == "math" for alias in node.names) else self.refuse(node)

    def do_Expr(self, node: ast.Expr) -> str:
        return "" if isinstance(node.value, ast.Constant) else f"{self.value(node.value)};"

    def do_Assign(self, node: ast.Assign) -> str:
        first, *others = map(self.target, node.targets)
        if not others:
            return f"{first} = {self.value(node.value)};"
        each = " ".join(f"{target} = value;" for target in (first, *others))  # from left to right, which JavaScript's a = b = c is not
        return f"((value) => {{ {each} }})({self.value(node.value)});"

    def do_AnnAssign(self, node: ast.AnnAssign) -> str:
        return f"{self.target(node.target)} = {self.value(node.value)};" if node.value else ""

    def do_AugAssign(self, node: ast.AugAssign) -> str:
        place = ast.copy_location(ast.BinOp(_loaded(node.target), node.op, node.value), node)
        return f"{self.target(node.target)} = {self.value(place)};"

    def do_Return(self, node: ast.Return) -> str:
        return f"return {self.value(node.value) if node.value else 'null'};"

    def do_If(self, node: ast.If) -> str:
        otherwise = f" else {self.block(node.orelse)}" if node.orelse else ""
        return f"if ({self.truth(node.test)}) {self.block(node.body)}{otherwise}"

    def do_For(self, node: ast.For) -> str:
        if node.orelse:
            self.refuse(node, "a loop with else has no translation")
        return f"for ({self.target(node.target)} of python.list({self.value(node.iter)})) {self.block(node.body)}"

    def do_Raise(self, node: ast.Raise) -> str:
        if not (isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)):
            self.refuse(node)
        return f"throw python.error({json.dumps(node.exc.func.id)}, {self.value(node.exc.args[0])});"

    def do_FunctionDef(self, node: ast.FunctionDef) -> str:
        if node.decorator_list:
            self.refuse(node, "a decorated function has no translation")
        return f"{_safe(node.name)} = python.named({self.names(node)}, function {self.function(node)});"

    def do_ClassDef(self, node: ast.ClassDef) -> str:
        if [ast.unparse(each).partition("(")[0] for each in node.decorator_list] != ["dataclass"] or node.bases:
            self.refuse(node, "only dataclasses without a base have a translation")
        fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
        given = ", ".join(f"{_safe(f.target.id)}{f' = {self.value(f.value)}' if f.value else ''}" for f in fields)
        own = "".join(f"this.{f.target.id} = {_safe(f.target.id)}; " for f in fields)
        lines = [f"{_safe(node.name)} = python.named({json.dumps([f.target.id for f in fields])}, class {node.name} {{"]
        lines.append(f"constructor({given}) {{ {own}this.__post_init__?.(); }}")
        after = []
        for each in node.body:
            if isinstance(each, ast.FunctionDef):
                kind = {"": "", "property": "get ", "classmethod": "static "}.get(" ".join(map(ast.unparse, each.decorator_list)))
                if kind is None:
                    self.refuse(each, "its decorator has no translation")
                lines.append(f"{kind}{each.name}{self.function(each, method=True)}")
                if not kind or kind == "static ":
                    owner = _safe(node.name) + ("" if kind else ".prototype")
                    after.append(f"python.named({self.names(each, method=True)}, {owner}.{each.name});")
        return "\n".join([*lines, "});", *after])

    def names(self, node: ast.FunctionDef, method: bool = False) -> str:
        return json.dumps([each.arg for each in (*node.args.args, *node.args.kwonlyargs)][method:])

    def function(self, node: ast.FunctionDef, method: bool = False) -> str:
        """Parameters and body; the names that Python makes local are declared first."""
        arguments = node.args
        if arguments.kwarg or arguments.posonlyargs:
            self.refuse(node, "its parameters have no translation")
        parameters = [*arguments.args, *arguments.kwonlyargs]
        defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults + arguments.kw_defaults
        shown = [_safe(p.arg) + (f" = {self.value(d)}" if d else "") for p, d in zip(parameters, defaults, strict=True)]
        first = f"const {shown.pop(0)} = this;\n" if method else ""
        shown += [f"...{arguments.vararg.arg}"] if arguments.vararg else []
        local = dict.fromkeys(name for name in _assigned(node.body) if name not in {p.arg for p in parameters})
        declared = f"let {', '.join(map(_safe, local))};\n" if local else ""
        return f"({', '.join(shown)}) {{\n{first}{declared}" + "\n".join(map(self.statement, node.body)) + "\n}"

    def target(self, node: ast.expr) -> str:
        if isinstance(node, ast.Tuple):
            return f"[{', '.join(map(self.target, node.elts))}]"
        return _safe(node.id) if isinstance(node, ast.Name) else self.value(node)

    # expressions

    def value(self, node: ast.expr) -> str:
        translator = getattr(self, f"of_{type(node).__name__}", None)
        return translator(node) if translator else self.refuse(node)

    def truth(self, node: ast.expr) -> str:
        return f"python.bool({self.value(node)})"

    def of_Constant(self, node: ast.Constant) -> str:
        return json.dumps(node.value, ensure_ascii=False)

    def of_Name(self, node: ast.Name) -> str:
        return f"python.{node.id}" if node.id in _BUILTINS | _TYPES | {"math"} else _safe(node.id)

    def of_Attribute(self, node: ast.Attribute) -> str:
        return f"{self.value(node.value)}.{node.attr}"

    def of_Subscript(self, node: ast.Subscript) -> str:
        return self.refuse(node) if isinstance(node.slice, ast.Slice) else f"{self.value(node.value)}[{self.value(node.slice)}]"

    def of_Call(self, node: ast.Call) -> str:
        arguments, function = ", ".join(map(self.value, node.args)), node.func
        if isinstance(function, ast.Attribute) and function.attr in _METHODS:
            return f"python.method({self.value(function.value)}, {json.dumps(function.attr)}, [{arguments}])"
        if node.keywords:
            if any(each.arg is None for each in node.keywords):
                self.refuse(node, "** in a call has no translation")
            named = ", ".join(f"{each.arg}: {self.value(each.value)}" for each in node.keywords)
            this = self.value(function.value) if isinstance(function, ast.Attribute) else "null"
            return f"python.call({this}, {self.value(function)}, [{arguments}], {{ {named} }})"
        made = isinstance(function, ast.Name) and (function.id in self.classes or function.id == "cls")
        return f"{'new ' * made}{self.value(function)}({arguments})"

    def of_Starred(self, node: ast.Starred) -> str:
        return f"...python.list({self.value(node.value)})"

    def of_BinOp(self, node: ast.BinOp) -> str:
        left, right = self.value(node.left), self.value(node.right)
        named = {ast.Mult: "times", ast.BitOr: "or", ast.Mod: "mod", ast.FloorDiv: "floor", ast.Add: "plus"}.get(type(node.op))
        if named:
            return f"python.{named}({left}, {right})"
        sign = {ast.Sub: "-", ast.Div: "/", ast.Pow: "**"}.get(type(node.op))
        return f"({left} {sign} {right})" if sign else self.refuse(node)

    def of_UnaryOp(self, node: ast.UnaryOp) -> str:
        if isinstance(node.op, ast.Not):
            return f"!{self.truth(node.operand)}"
        return f"(-{self.value(node.operand)})" if isinstance(node.op, ast.USub) else self.refuse(node)

    def of_BoolOp(self, node: ast.BoolOp) -> str:
        *before, last = map(self.value, node.values)
        for value in reversed(before):
            last = f"python.{'both' if isinstance(node.op, ast.And) else 'either'}({value}, () => {last})"
        return last

    def of_Compare(self, node: ast.Compare) -> str:
        sides = list(map(self.value, [node.left, *node.comparators]))
        return "(" + " && ".join(self.compared(op, *sides[i : i + 2]) for i, op in enumerate(node.ops)) + ")"

    def compared(self, op: ast.cmpop, left: str, right: str) -> str:
        if isinstance(op, (ast.In, ast.NotIn)):
            return f"{'!' * isinstance(op, ast.NotIn)}python.has({right}, {left})"
        if isinstance(op, (ast.Eq, ast.NotEq)):
            return f"{'!' * isinstance(op, ast.NotEq)}python.equal({left}, {right})"
        return f"{left} {_COMPARED[type(op)]} {right}"

    def of_IfExp(self, node: ast.IfExp) -> str:
        return f"({self.truth(node.test)} ? {self.value(node.body)} : {self.value(node.orelse)})"

    def of_NamedExpr(self, node: ast.NamedExpr) -> str:
        return f"({self.target(node.target)} = {self.value(node.value)})"

    def of_Lambda(self, node: ast.Lambda) -> str:
        return f"(({', '.join(_safe(each.arg) for each in node.args.args)}) => {self.value(node.body)})"

    def of_List(self, node: ast.List | ast.Tuple | ast.Set) -> str:
        return f"[{', '.join(map(self.value, node.elts))}]"

    of_Tuple = of_Set = of_List

    def of_Dict(self, node: ast.Dict) -> str:
        pairs = zip(node.keys, node.values, strict=True)
        return "{" + ", ".join(f"[{self.value(k)}]: {self.value(v)}" if k else f"...{self.value(v)}" for k, v in pairs) + "}"

    def of_ListComp(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp) -> str:
        return self.gone_through(node.generators, self.value(node.elt))

    of_GeneratorExp = of_ListComp

    def of_DictComp(self, node: ast.DictComp) -> str:
        pair = f"[{self.value(node.key)}, {self.value(node.value)}]"
        return f"Object.fromEntries({self.gone_through(node.generators, pair)})"

    def gone_through(self, generators: list[ast.comprehension], element: str) -> str:
        for number, generator in enumerate(reversed(generators)):
            each = f"({self.target(generator.target)})"
            kept = "".join(f".filter({each} => {self.truth(test)})" for test in generator.ifs)
            element = f"python.list({self.value(generator.iter)}){kept}.{'flatMap' if number else 'map'}({each} => {element})"
        return element

    def of_JoinedStr(self, node: ast.JoinedStr) -> str:
        return '("" + ' + " + ".join(map(self.value, node.values)) + ")" if node.values else '""'

    def of_FormattedValue(self, node: ast.FormattedValue) -> str:
        shape = self.value(node.format_spec) if node.format_spec else '""'
        return f"python.format({self.value(node.value)}, {shape}, {json.dumps(node.conversion == ord('r'))})"


def _safe(name: str) -> str:
    return f"{name}_" if name in _RESERVED else name


def _loaded(node: ast.expr) -> ast.expr:
    """The target ``node`` as a value."""
    return ast.parse(ast.unparse(node), mode="eval").body


def _assigned(body: list[ast.stmt]) -> list[str]:
    """The names that ``body`` binds, not counting those inside functions and comprehensions of its own."""
    names, waiting = [], list(body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.comprehension):
            waiting[:0] = [node.iter, *node.ifs]
        elif not isinstance(node, ast.Lambda):
            names += [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []
            waiting[:0] = ast.iter_child_nodes(node)
    return names
