"""Clean a Chinese corpus: repair the text, drop bad documents, keep one of many near-copies.

    python clean.py corpus/*.jsonl --out out/clean
    python clean.py web.jsonl.gz --out out/clean --off simplify,final_mark --ppl_sample good.txt

Text rules, in this order: mojibake control fullwidth replacement spaces simplify brackets quotes punctuation
repeats boilerplate blank_lines final_mark. They change marks, spaces and variants of characters, never the
sequence of Han characters, letters and digits (but for mojibake, 繁→简, terminal colours and whole
boilerplate lines). Lines without Chinese, and lines of code, get no more than mojibake, control, replacement
and blank_lines; Japanese, Korean and English lines with some Chinese keep their marks. In doubt nothing is
changed. Cleaning twice gives what cleaning once gives.

Filters, each drops whole documents: damaged length han_share symbol_share repeated_lines repeated_grams
keywords perplexity. Then exact_duplicates and near_duplicates, inside each input file first, then over all;
the longest copy stays. `--off NAME,NAME` switches any of them off.

Near-duplicates share at least --threshold of their 5-character shingles. 256 MinHash values per document
estimate that share (P[values agree] = Jaccard); bands of r values are the keys of a sort, and equal keys are
candidates: found with probability 1 − (1 − Jʳ)^(256/r): for the threshold of 0.7, with r = 6 and 42 bands,
99.5 % of those at 0.7 and 3 % of those at 0.3. Candidates are compared on all values, what agrees is joined.
Memory: 512 bytes per document in a mapped file, about 250 beside it.

The folder gets one .jsonl per input file ({"text": …}) and report.json: counts and examples of every rule.

Broder 1997 (MinHash); Li & König 2010, "b-Bit Minwise Hashing"; Lee et al. 2022, "Deduplicating Training
Data Makes Language Models Better"; Rae et al. 2021 (Gopher: repetition filters); Wenzek et al. 2020 (CCNet:
perplexity); Witten & Bell 1991 (smoothing).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import shutil
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

import common

BLOCK_DOCUMENTS = 200  # documents that a worker takes at a time
EXAMPLES = 3  # before/after pairs per rule in the report

# --- 1. what is prose, and what in it is not ----------------------------------------------------------------

HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_han = re.compile(f"[{HAN}]")
# Han, radicals, CJK marks, kana, full- and half-width forms: a line with none of them is no Chinese line
_cjk = re.compile(f"[{HAN}\u2e80-\u2fdf\u3000-\u30ff\ufe10-\ufe1f\uff01-\uffef]")
_kana_or_hangul = re.compile(
    "[\u3041-\u306d\u306f-\u3096\u30a1-\u30fa\uac00-\ud7a3]"
)  # の is seen in Chinese
_latin_word = re.compile(r"""(?<![^\s("“])[A-Za-z]{2,}(?=[,.;:!?)"”]*(?:\s|$))""")
_fence = re.compile(r"\s*(?:```|~~~)")
_strings_and_comments = re.compile(
    r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|(?<![A-Za-z])#.*|(?<!:)//.*|/\*.*?\*/|<!--.*?-->"""
)
_code_sign = re.compile(r"[=(){}\[\];<>]|^\s*(?:return|echo|puts|printf?|import|yield|raise|case)\b")
_code_line = re.compile(r"\s+#|\s*(?://|/\*|\*/)|\s*(?:'''|\"\"\")")
_code_shape = re.compile(  # code, whatever Chinese stands in it
    r"""(?x) \s*["'][^"']*["']\s*:.* | [ \t]*"[^"]*", | [ \t]+"[^"]*[^"。，！？.!?…]"    # a member in JSON
    | (?:\t|[ ]{2})\s*(?:[A-Za-z_][A-Za-z0-9_.]*\(.*|\w+\(.*\))                         # an indented call
    | \s*(?:if|elif|while|for|with|def|class|switch|function)\b.*[:{] | \s*[{}].* | .*[){=]\s*\{ | .*=.*;
    | \s*\#\s*(?:include|define|if|ifdef|ifndef|pragma)\b.* | \s*[a-z-]+:\s[^:]*; | \s*\$\s.*
    | \s*(?:SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER|FROM|WHERE|VALUES)\b.*"""
)

# Spans inside prose that no rule on marks touches: inline code, addresses, tags, entities, formulas, calls.
KEEP = (
    r"`[^`]+`"
    r"|(?<![A-Za-z0-9+.-])(?:[A-Za-z][A-Za-z0-9+.-]*://|www\.)[!#-&(-;=?-_a-~]*[A-Za-z0-9/_=&#%~+-]"
    r"|(?<![A-Za-z0-9._+-])[A-Za-z0-9._+-]+@[A-Za-z0-9-]+\.[A-Za-z0-9.-]*[A-Za-z0-9]"
    r"|</?[A-Za-z][^<>]*>|&\#?[A-Za-z0-9]{1,8};|\$[^$\u2e80-\uffff]+\$|\$[^$]{0,99}\\[A-Za-z][^$]{0,99}\$"
    r"|\\[A-Za-z]+\*?\{[^{}]*\}|\{[^{}]+\}|\[\s*[\"'][^\[\]]*\]"
    r"|(?:[A-Za-z0-9_]|\])\([^()，。；：！？]*\)"
)
_may_keep = re.compile(r"[`@<&$\\{]|://|www\.|[A-Za-z0-9_\]]\(|\[\s*[\"']").search  # most lines hold no such


@functools.lru_cache(256)  # one rule after the other asks about the same lines
def _language(line: str) -> str:
    """Say what a line is: "" (code, or nothing Chinese in it), "foreign" (with Chinese words) or "chinese".

    Code is what looks like it, or has Chinese in string literals and comments only: print("你好")  # 注释
    """
    if not _cjk.search(line) or len(line) < 500 and _code_shape.fullmatch(line.rstrip()):
        return ""
    bare = _strings_and_comments.sub("", line[:20_000])  # "/*/*/*…" takes quadratic time
    if not _cjk.search(bare) and (_code_sign.search(bare) or _code_line.match(line)):
        return ""
    words = len(_latin_word.findall(line))
    foreign = words > 2 and 2 * words > len(_han.findall(line)) or _kana_or_hangul.search(line)
    return "foreign" if foreign else "chinese"


def languages(lines: list[str]) -> Iterator[str]:
    """Tell of each line what language it is in, "" for code and all between code fences."""
    fenced = False
    for line in lines:
        fence = bool(_fence.match(line))
        fenced ^= fence
        yield "" if fence or fenced else _language(line)


def prose(trigger: str, foreign: bool = False) -> Callable:
    """Make a rule for a line into one for a text: it gets the Chinese (or foreign) lines with `trigger`."""
    found = re.compile(trigger).search

    def decorate(rule: Callable[[str], str]) -> Callable[[str], str]:
        @functools.wraps(rule)
        def apply(text: str) -> str:
            if not found(text):
                return text
            pairs = zip(lines := text.split("\n"), languages(lines))
            ours = ("chinese", "foreign") if foreign else ("chinese",)
            return "\n".join(rule(line) if its in ours and found(line) else line for line, its in pairs)

        return apply

    return decorate


def outside(pattern: str, replace: Callable[[re.Match], str]) -> Callable[[str], str]:
    """Make a function that replaces `pattern` everywhere but in the spans of KEEP."""
    alone, both = re.compile(pattern), re.compile(f"(?P<keep>{KEEP})|{pattern}")
    unless_kept = lambda m: m[0] if m["keep"] else replace(m)
    return lambda line: both.sub(unless_kept, line) if _may_keep(line) else alone.sub(replace, line)


# --- 2. text rules ------------------------------------------------------------------------------------------

# The characters as which latin-1 and cp1252 show the bytes 80-FF. Six make two Chinese characters: three
# ("é”—") may be honest French.
_CP1252 = {bytes([b]).decode("cp1252"): b for b in range(128, 160) if b not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)}
_latin = re.compile(f"[\x80-\xff{''.join(_CP1252)}]{{6,}}")


def mojibake(text: str) -> str:
    """Repair UTF-8 that was read as latin-1 or cp1252 (ä½\xa0å¥½ → 你好) where all of it is CJK text."""

    def repair(m: re.Match) -> str:
        try:
            read = bytes(_CP1252.get(c) or ord(c) for c in m[0]).decode()
        except UnicodeDecodeError:
            return m[0]
        return read if all(_cjk.match(c) or c in "“”‘’…—·" for c in read) else m[0]

    return _latin.sub(repair, text)


_newline = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_odd_space = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f]")
_invisible = re.compile(
    "\x1b\\[[0-9;]*[A-Za-z]|[\0-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]"
)
# scripts and emoji that need joiners
_JOINED = "\u0590-\u1aff\u2190-\u21ff\u2600-\u27bf\u2b00-\u2bff\ufe0f\U0001f000-\U0001faff"
_joiner = re.compile(f"(?<![{_JOINED}])[\u200c\u200d]+|[\u200c\u200d]+(?![{_JOINED}\u200c\u200d])")


def control(text: str) -> str:
    """Remove control (and terminal colours), zero-width and direction characters; plain line ends, spaces."""
    return _joiner.sub("", _invisible.sub("", _odd_space.sub(" ", _newline.sub("\n", text))))


# NFKC for these only: full-width letters, digits and signs, half-width kana and marks, radicals and
# compatibility ideographs. All of NFKC would lose meaning: ² → 2, ① → 1, ½ → 1⁄2, ℃ → °C, ㎡ → m2, … → ...,
# and would turn ，！？：；（） into ASCII. What is lost here: the full-width look, and which of the two code
# points of a character (金 U+F90A, 金 U+91D1) the author used. ｀ stays: it could open a code fence; and
# ． and － between Han, where they are a full stop (or the dot in a name) and a dash.
_WIDE = (
    "\uff02-\uff07\uff0a\uff0b\uff0d-\uff19\uff1c-\uff1e\uff20-\uff3f\uff41-\uff5d\uff61-\uffdc"
    "\u2e80-\u2fdf\uf900-\ufaff\U0002f800-\U0002fa1f"
)
_wide = re.compile(f"(?P<keep>`[^`]+`|(?<=[{HAN}])．|(?<=[{HAN}])－(?=[{HAN}])|(?<![ｦ-ﾝ])[ﾞﾟ])|[{_WIDE}]+")


@prose(f"[{_WIDE}]", foreign=True)
def fullwidth(line: str) -> str:
    """Write ＡＢＣ１２３％ as ABC123%, half-width ｶﾅ and ｡ as カナ and 。, radicals as characters."""
    line = re.sub("－{2,}", "——", line)  # typed for a dash
    return _wide.sub(lambda m: m[0] if m["keep"] else unicodedata.normalize("NFKC", m[0]), line)


def replacement(text: str) -> str:
    """Remove U+FFFD in words, where bytes were lost; where many were, `damaged` drops the document."""
    return re.sub(r"(?<=\w)\ufffd+|(?<!\ufffd)\ufffd+(?=\w)", "", text) if "\ufffd" in text else text


_space = outside(
    r"[ \t\u3000]*(?P<mark>[，。！？；：、])[ \t\u3000]*|[ \t\u3000]+", lambda m: m["mark"] or " "
)
_item = re.compile(r"[-*+>#|]|\d+[.)]")
_ENDS = "。！？….!?．“”‘’「」『』〝〞\"'"  # of sentences, and what the other rules make of such


@prose(r"[ \t\u3000]", foreign=True)
def spaces(line: str) -> str:
    """Put one space where there are several, none beside full-width marks and at the ends of a line.

    List items, other markup and what is no sentence keep their indent: it may be an outline.
    """
    body = line.strip(" \t\u3000")
    indent = line[: line.find(body)] if _item.match(body) or body[-1:] not in _ENDS else ""
    return ("" if "\u3000" in indent else indent) + _space(line).strip(" ")


def _package(name: str, rule: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{rule} needs a package: pip install {name}; or go without: --off {rule}") from None


@functools.cache
def _converter():
    return _package("opencc", "simplify").OpenCC("t2s")


_SIMPLIFIED_TOO = "乾瞭徵藉夥麽覆沈拚昇脩摺旂吒袷薹捱"


def simplify(text: str) -> str:
    """Write Traditional characters as Simplified ones, word by word (乾隆 and 乾淨 differ).

    A line where only characters would change that are Simplified too, is Simplified: 旋乾转坤, 毕昇.
    Words stay as they are (軟體 → 软体, not 软件), and so does 著: 看著 means 看着, but 著作 is no 着作, and
    OpenCC's tw2s, which tries to tell them apart, makes 原著 and 专著 wrong.
    """
    return text if _converter().convert(text) == text else _simplify_lines(text)  # most texts are Simplified


@prose(f"[{HAN}]")
def _simplify_lines(line: str) -> str:
    while (simple := _converter().convert(line)) != line:  # a new word may hold a word of the dictionary
        # 殢 stays: few fonts and vocabularies have the forms beyond the basic plane; 一坏 is seldom 一坯
        pairs = [(a, a if b > "\uffff" or a == "坏" else b) for a, b in zip(line, simple)]
        changed = "".join(a for a, b in pairs if a != b)
        if len(simple) != len(line) or not changed.strip(_SIMPLIFIED_TOO):
            break
        line = "".join(b for _, b in pairs)
    return line


def _bracket_pair(m: re.Match) -> str:
    left, inner, right = m["open"], _bracket(m["inner"]), m["close"]
    before = m.string[max(m.start("open") - 1, 0) : m.start("open")]
    if left + right == "()" and re.match(r"[A-Za-z0-9_\]}]", before):
        return m[0]  # f(甲), [甲](乙.png)
    if left + right == "（）":
        return m[0].replace(m["inner"], inner)  # with the spaces beside it
    if _han.search(inner) or (_han.match(before) and (left + right != "()" or inner.isspace())):
        return f"（{inner}）"
    return m[0].replace("（", "(").replace("）", ")")


_bracket = outside(  # with the spaces that a half-width pair has around it in Chinese
    rf"(?:(?<=[{HAN}A-Za-z0-9%”’）】》」』]) +)?(?P<open>[(（])(?P<inner>(?:[^()（）]|[(（][^()（）]*[)）])*)"
    rf"(?P<close>[)）])(?: +(?=[{HAN}A-Za-z0-9“‘（【《「『，。！？；：、]))?",
    _bracket_pair,
)


@prose("[()]")
def brackets(line: str) -> str:
    """Write (中文) as （中文） and let both brackets of a pair be of one width."""
    return _bracket(line)


_corner = str.maketrans("「」『』〝〞", "“”‘’“”")
_corner_alone = str.maketrans("『』〝〞", "“”“”")  # on a line without 「」, 『』 are no inner quotes
_straight, _double, _single = (  # the last: but not as in don't
    re.compile(f"(?P<keep>{KEEP})|{signs}")
    for signs in ('"', '["“”]', "(?<![A-Za-z0-9])'(?!\\d)|'(?![A-Za-z0-9])")
)


@prose("[「」『』〝〞\"'“”]")
def quotes(line: str) -> str:
    """Write 「」, and " and ' around Chinese, as “…” and ‘…’; repair pairs like “…“ and “…"."""
    line = line.translate(_corner if "「" in line or "」" in line else _corner_alone)
    if '"' in line:
        line = _pair(line, _straight, "“”")
    if "'" in line and "`" not in line:  # not `a' and `b', as in manuals
        line = _pair(line, _single, "‘’")
    straight = line.count('"')
    if straight == 1 or (not straight and line.count("“") != line.count("”")):
        line = _pair(line, _double, "“”")
    return line


def _pair(line: str, signs: re.Pattern, pair: str) -> str:
    """Take the signs two by two; make those that hold Chinese, or stand between Chinese, a proper pair."""
    places = [m.start() for m in signs.finditer(line) if not m["keep"]]
    chars = list(line)
    for a, b in zip(places[::2], places[1::2]) if len(places) % 2 == 0 else ():
        before, after = line[a - 1 : a], line[b + 1 : b + 2]
        beside = (
            pair == "“”" and _han.match(before) and _han.match(after) and re.search("[A-Za-z0-9]", line[a:b])
        )
        # ”…“ is the gap between two quotations, and so is "…" inside “…”, or after one that is not closed;
        # name="张三" is code, 15"屏幕 a size
        inside = line[a] == line[b] == '"' and line.count("“", 0, a) != line.count("”", 0, a)
        gap = line[a] + line[b] == "”“" or inside or re.match(r"[=(\[{0-9]", before)
        if (beside or _han.search(line, a, b)) and not gap:
            chars[a], chars[b] = pair
    return "".join(chars)


_FULL = str.maketrans(",;:?!", "，；：？！")
_LEFT = f"(?<=[{HAN}”’）】》])"  # what stands before a mark of a Chinese sentence
_full = outside(
    # 你好,world; not 坏!=好 你好:-) [类型:] 在::http
    rf"{_LEFT}(?:[,?!]|;(?!-?[)(])|:(?!-?[/\\)(DP](?![A-Za-z0-9])|[\]:]))(?!=)[?!]* *"
    rf"|{_LEFT} +[,;:?!](?: +|$|(?=[{HAN}]))"  # 你好 , 世界; not 选项 :wq
    rf"|(?<=[A-Za-z0-9)\]%℃+#])[,;?](?=[{HAN}])",  # Python,然后; not n!种
    lambda m: m[0].replace(" ", "").translate(_FULL),
)
_label = re.compile(
    "[ （(]*第?(?:[一二三四五六七八九十百]+|[甲乙丙丁戊己庚辛])[）)]?"
)  # before the dot: 十一. 概述
_stop = outside(  # 今天很好. 明天见.; not 文件.txt 约翰.史密斯
    rf"{_LEFT}[.．](?: +|$|(?=[”’）】]))", lambda m: m[0] if _label.fullmatch(m.string[: m.start()]) else "。"
)
_clock = re.compile(r"(?<=\d\d)：+(?=[0-5]\d(?!\d))|(?<=[a-z])：(?=//)")
_reference = re.compile(r"\[[A-Z]{1,2}(?:/OL)?\]|\(\d{4}[a-z]?\)\.")  # 张三. 书名[M]. 北京: 出版社


@prose(r"[,;:?!.．：]")
def punctuation(line: str) -> str:
    """Write , ; : ? ! . after Chinese in full width, ： in a time (12:30) in half width; not in citations."""
    return line if _reference.search(line) else _stop(_full(_clock.sub(":", line)))


# Of end marks each once (？！), of inner marks the first; then dashes and ellipses, but not 1，2，…，n
# and [选项...].
_marks = outside(
    "[。，、；！？]{2,}|：{2,}|～{2,}",
    lambda m: "".join(dict.fromkeys(re.sub("[，、；]", "", m[0]))) or m[0][0],
)
_dots = outside(
    rf"(?<![,，、+])(?<![,，、+] )…[.…]*(?![.…\]])|{_LEFT}\.{{3,}}[.…]*(?![.…\]])|—{{3,}}",
    lambda m: "——" if m[0][0] == "—" else "……",
)


@prose("[。，、；：！？～]{2}|…|—{3}|[.]{3}")
def repeats(line: str) -> str:
    """Shorten runs of marks (？？！！ → ？！); an ellipsis is ……, a dash ——."""
    return _dots(_marks(line))


# Whole lines only, and short: a sentence that mentions 版权所有者 or 责任编辑 stays.
_boilerplate = re.compile(
    r"""(?x) [\s【（(\[>»|*]* (?:
      (?:请?点击|点此|展开|查看|阅读|加载)+ (?:更多|全文|原文|大图|详情|下一页) (?:内容|文章)?
    | [\s©\w.\-]{0,30} 版权所有 (?:\s* (?:©|[(（][Cc][)）]|\d{4}|：) .{0,40})? | 保留所有权利
    | (?:责任编辑|责编) \s* ： .{0,20} | (?:上一篇|下一篇) \s* ： .{0,40} | (?:返回|回到) (?:顶部|首页|列表)
    | 分享(?:到|至) (?:微信|新浪微博|微博|朋友圈|QQ空间|QQ|人人网|豆瓣|[：、，|\s])*
    | (?:(?:打印本页|关闭窗口|加入收藏|设为首页) [\s|]*){2,}
    | (?:微信)?扫一?扫.{0,12}二维码[^的是就]{0,9} | (?:欢迎|请)(?:扫码)?关注.{0,12}公众号[^的是就]{0,12}
    | 未经.{0,10}(?:授权|许可|允许).{0,6}(?:不得|禁止|严禁).{0,6}转载.{0,6} ) [\s】）)\]>»|*。！…]*"""
)


def boilerplate(text: str) -> str:
    """Remove lines that belong to a web page and not to its text: 点击查看更多, 责任编辑：…, 版权所有 ©…"""
    lines = text.split("\n")
    junk = [len(line) <= 80 and _boilerplate.fullmatch(line) for line in lines]
    if not any(junk):
        return text
    return "\n".join(x for x, bad, its in zip(lines, junk, languages(lines)) if not (bad and its))


def blank_lines(text: str) -> str:
    """Leave two empty lines where there are more, none at both ends. Texts with a code fence keep theirs."""
    text = re.sub(r"\A(?:[ \t\u3000]*\n)+", "", text)
    body = text.rstrip(" \t\u3000\n")
    text = body + text[len(body) :].split("\n")[0]
    return text if "```" in text else re.sub(r"\n(?:[ \t]*\n){3,}", "\n\n\n", text)


_heading = re.compile(
    r"[ \t]|(?:[#|│>*•·\-—–\[【《]|[（(]?[一二三四五六七八九十]+[）)、.\s]|[（(]?\d+[）)、.\s]"
    r"|第[\d一二三四五六七八九十百千零〇两]+[章节条回部篇卷编课集]|[^，。！？；：:]{1,8}[：:](?!//))"
)
_sentence_end = re.compile("[。！？…：；”）]$")
# words that sentences have and titles seldom: 我们一起去公园; not 指纹阅读器和智能卡, 山园小梅二首其一林逋
_telling = re.compile("[了是我你您他她它们这那没让把被就也很吗吧呢]")
# what is broken off inside （ “ 《, or ends in a name: …。秦竹村
_open_end = re.compile(rf"（[^）]*$|“[^”]*$|《[^》]*$|[。！？…][{HAN}]{{1,4}}$")


def final_mark(text: str) -> str:
    """Close the text's last line with 。 if it ends in a Han character and is a sentence, no heading.

    A sentence has a mark inside, or at least eight Han characters, one of them seldom found in titles, and no
    open line (another item) before it.
    """
    lines = text.split("\n")
    last, before = lines[-1], next((x for x in lines[-2::-1] if x.strip()), "。")
    if not _han.match(last[-1:]) or _heading.match(last) or _open_end.search(last):
        return text
    long = len(_han.findall(last)) >= 8 and _telling.search(last) and _sentence_end.search(before)
    if not (long or re.search("[，。！？；]", last)) or list(languages(lines))[-1] != "chinese":
        return text
    return text + "。"


_rules = (mojibake, control, fullwidth, replacement, spaces, simplify, brackets, quotes, punctuation, repeats)
_rules += (boilerplate, blank_lines, final_mark)
TEXT_RULES = {rule.__name__: rule for rule in _rules}


def clean_text(text: str, off: frozenset[str] = frozenset()) -> str:
    """Apply all text rules but those named in `off`, in order; doing it twice changes nothing more."""
    for name, rule in TEXT_RULES.items():
        if name not in off:
            text = rule(text)
    return text


# --- 3. document filters ------------------------------------------------------------------------------------


@dataclass
class CleanConfig:
    files: tyro.conf.Positional[tuple[str, ...]]  # .txt, .jsonl (.gz, .zst), .parquet, or folders of them
    out: str  # folder to write
    off: str = ""  # rules, filters and stages to leave out, by name, with commas between
    min_chars: int = 5  # length: fewest letters, digits and Han characters of a document
    max_chars: int = 1_000_000  # length: most characters of a document
    min_han: float = 0.3  # han_share: least share of Han characters among the letters; English corpus: 0
    max_symbols: float = 0.3  # symbol_share: largest share of signs that are no usual punctuation
    max_repeats: float = 0.3  # repeated_lines, repeated_grams: largest share of text that stood there before
    keywords: str = ""  # keywords: file with one word per line; a document that holds one is dropped
    ppl_sample: str = ""  # perplexity: a file of good text; a character model learns from it what is normal
    max_ppl: float = 0.0  # perplexity: largest per character; 0: what 99 % of the sample's pieces keep
    threshold: float = 0.7  # near_duplicates: share of common 5-character shingles (Jaccard)
    workers: int = 0  # processes; 0: one per core
    overwrite: bool = False  # replace --out if it exists


@dataclass
class Context:
    """What a filter may ask for besides the document."""

    config: CleanConfig
    off: frozenset[str]
    keywords: list[str]
    model: CharModel | None
    max_ppl: float


_han_run = re.compile(f"[{HAN}]+")
# signs of bytes that nobody can restore; “锟斤拷” in quotation marks is a text about them
_lost = re.compile('\ufffd+|锟斤拷(?<![“「『"]锟斤拷)|烫{5,}|屯{5,}')
_plain = re.compile(r"[\s，。！？；：、“”‘’（）《》…—·,.!?;:'\"()\-]+")


def damaged(raw: str, text: str, context: Context) -> bool:
    """More than one character in a thousand is lost (U+FFFD, 锟斤拷): the rest is no longer its sentences."""
    return sum(map(len, _lost.findall(raw))) > len(raw) / 1000


def length(raw: str, text: str, context: Context) -> bool:
    """Too little text or too much."""
    config = context.config
    return sum(map(str.isalnum, text)) < config.min_chars or len(text) > config.max_chars


def han_share(raw: str, text: str, context: Context) -> bool:
    """Too few Han characters among the letters: another language, or a page of numbers and names."""
    rest = _han_run.sub("", text)
    han = len(text) - len(rest)
    return han < context.config.min_han * (han + sum(map(str.isalpha, rest)))


def symbol_share(raw: str, text: str, context: Context) -> bool:
    """Too many signs such as | # * ■ among what is no space and no usual punctuation."""
    seen = _plain.sub("", text)
    return len(seen) - sum(map(str.isalnum, seen)) > context.config.max_symbols * len(seen)


def repeated_lines(raw: str, text: str, context: Context) -> bool:
    """Too much of the text is lines (with a letter or digit) that stood there before."""
    counts = Counter(line for line in text.split("\n") if re.search(r"\w", line))
    again = sum((n - 1) * len(line) for line, n in counts.items())
    return again > context.config.max_repeats * sum(n * len(line) for line, n in counts.items())


def repeated_grams(raw: str, text: str, context: Context) -> bool:
    """Too many of the text's 10-character windows stood there before."""
    form = comparable(text)
    windows = len(form) - 9
    return windows - len({form[i : i + 10] for i in range(windows)}) > context.config.max_repeats * windows


def keywords(raw: str, text: str, context: Context) -> bool:
    """One of the user's words is in the cleaned text, whatever its case."""
    lower = text.casefold()
    return any(word in lower for word in context.keywords)


def perplexity(raw: str, text: str, context: Context) -> bool:
    """The character model is more surprised than --max_ppl; a text under 50 characters says too little."""
    if context.model is None or len(text) < 50:
        return False
    return context.model.nll(text[:4000]) > math.log(context.max_ppl)


_filters = (damaged, length, han_share, symbol_share, repeated_lines, repeated_grams, keywords, perplexity)
FILTERS = {test.__name__: test for test in _filters}
STAGES = ("exact_duplicates", "near_duplicates")
NAMES = [*TEXT_RULES, *FILTERS, *STAGES]  # what --off takes, in the order in which it happens


# --- 4. the character model of the perplexity filter --------------------------------------------------------

SAMPLE = 50_000  # pieces of a sample are read: trigrams of more change little and fill the memory
PIECE = 200  # characters; every tenth piece is held out


class CharModel:
    """Character trigrams with Witten-Bell smoothing, in sorted arrays: 1 M characters take 10 to 25 MB.

    p(c | h) = (count(hc) + types(h) · p(c | h without its first character)) / (count(h) + types(h)), where
    types(h) counts the different characters seen after h; under it all lies 1/2¹⁶ for any character.
    """

    def __init__(self, texts: list[str]):
        self.tables = []
        for grams in self._grams("\n\n".join(texts)):
            keys, counts = np.unique(grams, return_counts=True)
            histories, first = np.unique(keys >> 21, return_index=True)
            totals = np.add.reduceat(counts, first)
            types = np.diff(first, append=len(keys))
            self.tables.append((keys, counts, histories, totals, types))

    @staticmethod
    def _grams(text: str) -> list[np.ndarray]:
        """Give the uni-, bi- and trigram that ends at each character, 21 bits a character in one uint64."""
        c = np.frombuffer(("\n\n" + text).encode("utf-32-le"), np.uint32).astype(np.uint64)
        pairs = c[1:-1] << 21 | c[2:]
        return [c[2:], pairs, c[:-2] << 42 | pairs]

    def nll(self, text: str) -> float:
        """Mean negative log-probability of a character, in nats; its exponential is the perplexity."""
        p = np.full(len(text), 2.0**-16)
        for grams, (keys, counts, histories, totals, types) in zip(self._grams(text), self.tables):
            at, known = _find(histories, grams >> 21)
            total, kinds = np.where(known, totals[at], 0), np.where(known, types[at], 0)
            at, known = _find(keys, grams)
            seen = np.where(known, counts[at], 0)
            p = np.where(total, (seen + kinds * p) / np.maximum(total + kinds, 1), p)
        return float(-np.log(p).mean())


def _find(sorted_keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give for each wanted key its place among the sorted ones, and whether it is there at all."""
    at = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return at, sorted_keys[at] == wanted


def learn_normal(path: str, off: frozenset[str]) -> tuple[CharModel, float]:
    """Train the model on a clean sample; give it and the perplexity that 99 % of the held-out pieces keep."""
    pieces = []
    for text in common.documents([path]):
        text = clean_text(text, off)
        pieces += [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
        if len(pieces) >= SAMPLE:
            break
    held_out = [p for p in pieces[::10] if len(p) >= 50]
    if len(held_out) < 10:
        raise ValueError(f"--ppl_sample {path}: too little to learn from; give 20,000 characters or more")
    del pieces[::10]
    model = CharModel(pieces)
    return model, float(np.exp(np.quantile([model.nll(p) for p in held_out], 0.99)))


# --- 5. de-duplication --------------------------------------------------------------------------------------

SHINGLE = 5
SLOTS = 256  # MinHash values per document; the low 16 bits of each are kept: chance agreement is 1/65536
WINDOW = 32  # in a bucket each document is compared with so many that follow it
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ / golden ratio: a multiplier that spreads bits


def comparable(text: str) -> str:
    """Give the form in which documents are compared: without white space and case."""
    return "".join(text.split()).casefold()


def shingle_hashes(text: str) -> np.ndarray:
    """Hash every window of SHINGLE characters, uint64 (windows,); a shorter text is one window, itself."""
    codes = np.frombuffer(text.ljust(SHINGLE, "\0").encode("utf-32-le"), np.uint32).astype(np.uint64)
    hashes = np.zeros(len(codes) - SHINGLE + 1, np.uint64)
    for i in range(SHINGLE):
        hashes = hashes * _ODD + codes[i : i + len(hashes)]
    return hashes


def signatures(texts: list[str]) -> np.ndarray:
    """Compute the MinHash signatures (documents, SLOTS) uint16 of texts in their comparable form.

    By rensa: with the shingle hashes from above 31 µs a document of 100 characters on one core (5 of them in
    Rust, 26 for lists → numpy); datasketch takes 75 and numpy alone 78. Its estimate is also the sharpest:
    standard deviation 0.020 at a Jaccard similarity of 0.75, where classic MinHash has 0.027.
    """
    minhash = _package("rensa", "near_duplicates").RMinHash
    hashes = [shingle_hashes(text) for text in texts]
    offsets = np.cumsum([0, *map(len, hashes)]).astype(np.uint64)
    rows = minhash.digest_matrix_from_flat_token_hashes(np.concatenate(hashes), offsets, SLOTS, 1).to_rows()
    return np.array(rows, np.uint32).astype(np.uint16)


def band_rows(threshold: float) -> int:
    """Give the most values per band (fewest false candidates) that find 99 % of pairs at the threshold."""
    rows = [r for r in range(1, SLOTS + 1) if 1 - (1 - threshold**r) ** (SLOTS // r) >= 0.99]
    return max(rows, default=1)


def join(parent: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Union-find on arrays of pairs: hook the higher root under the lower, flatten; until all pairs agree."""
    while True:
        roots = parent[a], parent[b]
        low, high = np.minimum(*roots), np.maximum(*roots)
        if (low == high).all():
            return
        np.minimum.at(parent, high, low)
        while ((above := parent[parent]) != parent).any():
            parent[:] = above


def near_duplicates(sigs: np.ndarray, alive: np.ndarray, group: np.ndarray, threshold: float):
    """Give each document the lowest number of its connected component of near-duplicates, (documents,) int64.

    sigs (documents, SLOTS); only the documents in `alive` (numbers, ascending) and of equal `group`
    (documents,) are compared. Equal bands make candidates; candidates that agree in at least `threshold` of
    all slots are joined, so A~B~C is one component though A and C may differ more.
    """
    parent = np.arange(len(sigs))
    rows = band_rows(threshold)
    bar = common.progress(SLOTS // rows, "near-duplicates", "band")
    for first in range(0, SLOTS - rows + 1, rows):
        band = sigs[alive, first : first + rows].astype(np.uint64)
        key = group[alive].astype(np.uint64)
        for column in band.T:
            key = (key ^ (key >> np.uint64(31))) * _ODD + column
        order = np.argsort(key, kind="stable")
        key, number = key[order], alive[order]
        for lag in range(1, WINDOW + 1):
            same = np.flatnonzero(key[lag:] == key[:-lag])
            if not len(same):
                break
            for part in np.array_split(same, 1 + len(same) // 100_000):  # bounds the memory
                a, b = number[part], number[part + lag]
                apart = parent[a] != parent[b]
                a, b = a[apart], b[apart]
                alike = (sigs[a] == sigs[b]).mean(1) >= threshold
                join(parent, a[alike], b[alike])
        bar.update()
    bar.close()
    return parent


def longest_of_each(labels: np.ndarray, alive: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Of the documents with one label keep the longest, the first of equals; returns numbers, ascending."""
    order = alive[np.lexsort((alive, -sizes[alive], labels[alive]))]
    sorted_labels = labels[order]
    first = np.append(True, sorted_labels[1:] != sorted_labels[:-1])
    return np.sort(order[first])


# --- 6. the command -----------------------------------------------------------------------------------------


def clean(config: CleanConfig) -> None:
    """Clean, filter and de-duplicate documents into a folder of .jsonl files with a report."""
    files, context = common.document_files(config.files), prepare(config)
    counts, examples, tables = Counter(), defaultdict(list), []
    with common.atomic_folder(config.out, config.overwrite) as out:
        scratch = out / "scratch"
        scratch.mkdir()
        with (
            common.progress(common.plain_bytes(files), "clean", "B") as bar,
            open(scratch / "documents", "wb") as documents,
            open(scratch / "signatures", "wb") as values,
        ):
            workers = config.workers or os.cpu_count() or 1
            blocks = common.ordered_map(_clean_block, _blocks(files), workers, _start_worker, context)
            for lines, table, sigs, done, shown in blocks:
                documents.writelines(lines)
                values.write(sigs.tobytes())
                tables.append(table)
                counts.update(done)
                for name, example in shown:
                    examples[name] += [example] * (len(examples[name]) < EXAMPLES)
                bar.update(done["bytes"])
        table = np.concatenate([np.zeros((0, 3), np.int64), *tables])
        if not len(table):
            why = "".join(f", {n} dropped {counts[n]:,}" for n in FILTERS if counts[n])
            raise ValueError(f"no document is left to write: {counts['read']:,} documents read{why}")
        kept = deduplicate(table, scratch / "signatures", context, counts)
        _write(out, files, scratch / "documents", table[:, 0], kept)
        shutil.rmtree(scratch)
        report = {
            "sources": list(map(str, files)),
            "off": sorted(context.off),
            "documents": {"read": counts["read"], "kept": len(kept)},
            "characters": {"read": counts["characters"], "kept": int(table[kept, 1].sum())},
            "max_ppl": context.max_ppl or None,
            "rules": {n: {"documents": counts[n], "examples": examples[n]} for n in NAMES},
        }
        common.write_json(out / "report.json", report)
    print(", ".join(f"{n} {counts[n]:,}" for n in NAMES if counts[n]))
    read, left = (common.human(n) for n in report["characters"].values())
    print(f"kept {len(kept):,} of {counts['read']:,} documents, {left} of {read} characters")


def prepare(config: CleanConfig) -> Context:
    """Check what the user typed, read the keywords, learn from the sample."""
    off = frozenset(name.strip() for name in config.off.split(",") if name.strip())
    if unknown := sorted(off.difference(NAMES)):
        raise ValueError(f"--off {', '.join(unknown)}: no such rule; there are {', '.join(NAMES)}")
    bounds = {"min_han": (0, 1), "max_symbols": (0, 1), "max_repeats": (0, 1), "threshold": (0.1, 1)}
    bounds |= {"min_chars": (0, config.max_chars), "max_ppl": (0, math.inf), "workers": (0, math.inf)}
    for name, (low, high) in bounds.items():
        if not low <= (value := getattr(config, name)) <= high:
            raise ValueError(f"--{name} {value} must lie in [{low}, {high}]")
    if config.max_ppl and not config.ppl_sample:
        raise ValueError("--max_ppl needs --ppl_sample FILE: good text, from which to learn what is normal")
    for name, uses_a_package in (("simplify", simplify), ("near_duplicates", lambda t: signatures([t]))):
        if name not in off:
            uses_a_package("试")  # says here, not in a worker, that it is missing
    words, model, limit = [], None, config.max_ppl
    if config.keywords:
        if not Path(config.keywords).is_file():
            raise ValueError(f"--keywords {config.keywords}: no such file")
        words = Path(config.keywords).read_text(encoding="utf-8-sig").casefold().split("\n")
        words = [word.strip() for word in words if word.strip()]
    if config.ppl_sample and "perplexity" not in off:
        model, held_out = learn_normal(config.ppl_sample, off)
        limit = limit or held_out
    return Context(config, off, words, model, limit)


def _blocks(files: list[Path]) -> Iterator[tuple]:
    for source, path in enumerate(files):
        documents = common.raw_documents(path)
        while block := list(itertools.islice(documents, BLOCK_DOCUMENTS)):
            yield source, path, block


_worker: dict = {}  # what a cleaning process keeps between blocks


def _start_worker(context: Context) -> None:
    _worker.update(context=context)


def _clean_block(block: tuple[int, Path, list[tuple[int, bytes]]]) -> tuple:
    """Clean and filter a block of documents, counting what each rule does, and hash what is left.

    Returns of the documents left the lines to write, a table (documents, 3) of source, characters, 64-bit
    hash, and the signatures; and of all of them counts by rule and examples (rule, example).
    """
    source, path, documents = block
    context, counts, examples, lines, table, forms = _worker["context"], Counter(), [], [], [], []
    for line, raw in documents:
        given = text = common.parse_document(raw, path, line)
        counts.update(read=1, characters=len(given), bytes=len(raw))
        for name, rule in TEXT_RULES.items():
            if name not in context.off and (new := rule(text)) != text:
                if counts[name] < EXAMPLES:
                    at = max(0, len(os.path.commonprefix([text, new])) - 15)
                    examples.append((name, {"before": text[at : at + 50], "after": new[at : at + 50]}))
                counts[name] += 1
                text = new
        drop = next((n for n, f in FILTERS.items() if n not in context.off and f(given, text, context)), None)
        if drop:
            counts[drop] += 1
            examples.append((drop, given[:80]))
            continue
        forms.append(comparable(text))
        digest = hashlib.blake2b(forms[-1].encode(), digest_size=8).digest()
        table.append((source, len(text), int.from_bytes(digest, "big", signed=True)))
        lines.append(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
    sigs = signatures(forms) if forms and "near_duplicates" not in context.off else np.zeros(0)
    return lines, np.array(table, np.int64).reshape(-1, 3), sigs, counts, examples


def deduplicate(table: np.ndarray, path: Path, context: Context, counts: Counter) -> np.ndarray:
    """Give the numbers of the documents to keep, ascending: one of each inside its source, then over all.

    table (documents, 3) int64: source, characters, hash; `path` holds the signatures. Adds to `counts`.
    """
    source, sizes, digests = table.T
    alive = np.arange(len(table))
    for group in [source, np.zeros_like(source)] if source.any() else [source]:
        for stage in [s for s in STAGES if s not in context.off]:
            if stage == "exact_duplicates":
                labels = np.unique(digests + group * 0x9E3779B97F4A7C1, return_inverse=True)[1]
            else:
                sigs = np.memmap(path, np.uint16, "r").reshape(-1, SLOTS)
                labels = near_duplicates(sigs, alive, group, context.config.threshold)
            before, alive = alive, longest_of_each(labels, alive, sizes)
            counts[stage] += len(before) - len(alive)
    return alive


def _write(out: Path, files: list[Path], documents: Path, source: np.ndarray, kept: np.ndarray) -> None:
    """Copy the lines of the documents to keep, one file per source."""
    keep = np.zeros(len(source), bool)
    keep[kept] = True
    with open(documents, "rb") as lines:
        for i, path in enumerate(files):
            with open(out / f"{i:05d}-{path.name.split('.')[0]}.jsonl", "wb") as file:
                file.writelines(line for ours, line in zip(keep[source == i], lines) if ours)


if __name__ == "__main__":
    common.run(clean, doc=__doc__)
