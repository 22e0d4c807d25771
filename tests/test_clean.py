"""Cleaning changes what it should and nothing else; filters count what they drop; near-duplicates are found and only they."""

import functools
import gzip
import json
import random
import re
import unicodedata

import numpy as np
import pytest
from conftest import ROOT, run_script

import clean
from clean import clean_text

# --- helpers -------------------------------------------------------------------------------------------------

PEOPLE = "小明 老师 妈妈 工程师 医生 王先生 孩子们 农民 校长 邻居".split()
PLACES = "学校 公园 图书馆 医院 车站 海边 山上 工厂 市场 家里".split()
TIMES = "今天早上 昨天晚上 上个星期 去年冬天 每到周末 天黑以后 下雨的时候 放学之后".split()
DEEDS = "认真地看书 买了一些水果 和朋友聊天 修理旧机器 给病人看病 种了几棵树 写了一封长信 唱起了老歌".split()
ENDS = "大家都很高兴 谁也没有说话 事情就这样结束了 他觉得很有意思 回家时天已经黑了 第二天又来了".split()


def sentence(rng):
    return f"{rng.choice(TIMES)}，{rng.choice(PEOPLE)}在{rng.choice(PLACES)}{rng.choice(DEEDS)}，{rng.choice(ENDS)}。"


def story(rng, sentences=8):
    return "".join(sentence(rng) for _ in range(sentences))


def random_han(rng, count):
    """Random Han text: two documents share practically no 5-character shingle."""
    return "".join(chr(rng.randint(0x4E00, 0x9FA5)) for _ in range(count))


def shingles(text, k=5):
    return {text[i : i + k] for i in range(len(text) - k + 1)}


def jaccard(a, b):
    a, b = shingles(a), shingles(b)
    return len(a & b) / len(a | b)


def edited(rng, text, rate):
    """Replace, delete or insert a share of the characters."""
    out = []
    for c in text:
        if rng.random() >= rate:
            out.append(c)
        else:
            out.append(rng.choice(["", random_han(rng, 1), c + random_han(rng, 1)]))
    return "".join(out)


def write_jsonl(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), "utf-8")
    return path


def run_clean(tmp_path, *files, **options):
    """Clean in this process; return (texts kept, in order; report)."""
    out = tmp_path / "out"
    clean.clean(clean.CleanConfig(tuple(map(str, files)), str(out), **{"workers": 1, **options}))
    texts = [json.loads(x)["text"] for f in sorted(out.glob("*.jsonl")) for x in f.open(encoding="utf-8")]
    return texts, json.loads((out / "report.json").read_text("utf-8"))


# --- 1. golden pairs -----------------------------------------------------------------------------------------

CHANGED = [
    # given with the task
    ("今天天气很好。。。。。", "今天天气很好。"),
    ("真的吗？？？！！", "真的吗？！"),
    ("ＡＢＣ１２３", "ABC123"),
    ("第一章　　总则", "第一章 总则"),
    ("他說：「這是臺灣。」", "他说：“这是台湾。”"),
    ("C++与C#的区别是什么?", "C++与C#的区别是什么？"),
    ("价格是3.5元,比昨天高", "价格是3.5元，比昨天高。"),
    ("\u200b\ufeff你好", "你好"),
    # width
    ("增长了５０％，达到１２３．５万", "增长了50%，达到123.5万。"),
    ("会议在12：30开始。", "会议在12:30开始。"),
    ("⼈民的⽣活", "人民的生活"),  # Kangxi radicals, as PDF files give them
    ("半角句号｡半角顿号､", "半角句号。半角顿号、"),
    ("ﾃﾚﾋﾞを見る", "テレビを見る"),  # and Japanese is not simplified
    ("面积２０㎡，水温３０℃。", "面积20㎡，水温30℃。"),
    # spaces
    ("\u3000\u3000今天\xa0天气很好。\u2003", "今天 天气很好。"),
    ("他说 ： 好 。 我知道 ， 谢谢 ！", "他说：好。我知道，谢谢！"),
    ("你好\tworld", "你好 world"),
    ("一行\r\n二行\r三行\u2028四行", "一行\n二行\n三行\n四行"),
    # traditional
    ("乾隆皇帝的頭髮很乾淨", "乾隆皇帝的头发很干净。"),
    ("理髮師發現了", "理发师发现了"),
    # quotes and brackets
    ('他说"你好"。', "他说“你好”。"),
    ('小明用"print"函数。', "小明用“print”函数。"),
    ("『書名』很好。", "“书名”很好。"),
    ("「他說『好』」", "“他说‘好’”"),
    ("他说“你好“。", "他说“你好”。"),
    ('他说“你好"。', "他说“你好”。"),
    ("他说:'你好'", "他说：‘你好’"),
    ("北京(中国的首都)很大。", "北京（中国的首都）很大。"),
    ("北京（中国的首都)很大。", "北京（中国的首都）很大。"),
    ("北京(首都)", "北京（首都）"),
    ("(末唱)(旦云)好。", "（末唱）（旦云）好。"),
    # punctuation by context
    ("你好!再见;谢谢:完", "你好！再见；谢谢：完。"),
    ("用Python,然后用C++,都可以。", "用Python，然后用C++，都可以。"),
    ("好. 明天见.", "好。明天见。"),
    ("时间:12:30", "时间：12:30"),
    ("然后...他走了……", "然后……他走了……"),
    ("然后…他走了", "然后……他走了"),
    ("见https://a.b/c,然后登录", "见https://a.b/c，然后登录。"),
    # repeats
    ("好，，，真的、、对吧", "好，真的、对吧。"),
    ("完了，。", "完了。"),
    ("等等————他说", "等等——他说"),
    ("等等－－他说", "等等——他说"),
    ("好～～～～", "好～"),
    ("是吗？！？！？！", "是吗？！"),
    # final mark
    ("我们明天早上一起去公园", "我们明天早上一起去公园。"),
    ("你好，世界", "你好，世界。"),
    ("# 标题\n正文在这里，有一句话", "# 标题\n正文在这里，有一句话。"),
    # boilerplate and blank lines
    ("正文在这里。\n点击查看更多\n版权所有 © 2020 某某网\n责任编辑：张三", "正文在这里。"),
    ("分享到：微信 微博\n正文在这里。", "正文在这里。"),
    ("（責任編輯:李四）\n正文在这里。", "正文在这里。"),
    ("\n\n一。\n\n\n\n\n二。\n\n", "一。\n\n\n二。"),
    # broken encodings
    ("今天天气很好。".encode().decode("latin-1"), "今天天气很好。"),
    ("今天\ufffd\ufffd天气很好。", "今天天气很好。"),
    ("\x1b[31m错误\x1b[0m：没有文件。", "错误：没有文件。"),
    # found by reading what the rules did to real text
    ("『甲』（乙(丙)丁）很好。", "“甲”（乙（丙）丁）很好。"),
    ("甲(乙(丙)丁)很好。", "甲（乙（丙）丁）很好。"),
    ("下列正确的是(　　)。", "下列正确的是（ ）。"),
    ("温度是-3.5℃,很冷。", "温度是-3.5℃，很冷。"),
    ("地址：ｈｔｔｐ：／／ａ．ｂ／ｃ", "地址：http://a.b/c"),
    ("二〇一〇年．", "二〇一〇年。"),
    ("'70年代,'80年代的歌。", "'70年代，'80年代的歌。"),
    ("酒精,與您的健康", "酒精，与您的健康。"),
    ("他买了手机,一坏就換新的。", "他买了手机，一坏就换新的。"),
    ("几回殢酒，無人問。", "几回殢酒，无人问。"),  # 𣨼 is in no font and no vocabulary
    ("公式\\text{甲,乙}好,很好。", "公式\\text{甲,乙}好，很好。"),
    ("然后他走了...[选项]...", "然后他走了……[选项]..."),
    ("    他走了。\n    类型：银行账户\n结束。", "他走了。\n    类型：银行账户\n结束。"),
]

UNCHANGED = [
    # given with the task
    'he said "no".',
    "f(x)=x**2",
    "见https://a.b/c?d=1,2",
    "他想了想……走了。",
    'print("你好")  # 注释',
    # numbers, units, symbols that NFKC would spoil
    "面积是20m²，第①条，水温30℃，占½，№5，™。",
    "圆周率是3.14159，人口1,400,000，比分3:2。",
    "价格从$5涨到$6。",
    # marks that are right
    "“你好，”他说，“再见。”",
    "他走了。”她说：“好。",  # a quotation over several lines
    "《红楼梦》——曹雪芹",
    "苹果(Apple)发布了手机。",
    "约翰.史密斯来了。",
    "Hello, 世界",
    "J.K.罗琳写了书。",
    "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。",
    # code and markup
    "x = {'名': \"张三\", \"岁\": 3}  # 字典, 两个键",
    "    return f(\"你好,世界\")",
    '{"text": "你好,世界...", "n": 1}',
    "```python\n# 注释,不要改!!!\nx = '你好...'\n\n\n\n\ny = 1\n```",
    "用`a,b = f(x)  `求值。",
    "<a href=\"x,y\" title=\"你好,世界\">链接</a>",
    "公式$a,b;c$很好。",
    "邮箱是zhang.san@a-b.com,c",
    "if (a && b) { return; }  // 返回,结束",
    "变量name=\"张三\"的值。",
    "调用print(\"你好\")输出。",
    "[文字](图片.png)",
    "A&nbsp;你好",
    "def f(a,b):\n    '''文档'''\n\n\n    return a",
    "Don't touch  this,   please...",
    "cafe\u0301 na\u00efve \u201cquotes\u201d, done",
    # headings and other lines without a final mark
    "第三章 网络与安全的基本概念",
    "一、总体要求和基本原则如下",
    "# 关于这个项目的一些说明",
    "- 列表里的一项没有句号的内容",
    "-- 一九二七年，鲁迅",
    "作者：鲁迅先生和他的朋友们",
    "短标题",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467一家人",
    "版权所有者有权转让自己的作品。",
    "责任编辑是一种职业。",
    "版权所有（COPYRIGHT）\n这是一节的标题。",
    "主题\n通过键盘修改行和列",  # one item of a list
    "旋乾转坤，一目瞭然。",
    "圆圈（半径为3）很大。",
    "这里\u3010重点\u3011写得很清楚。",
    # found by reading what the rules did to real text
    "Tokyo (东京), Beijing (北京), and Seoul.",
    'In Chinese, "你好" means hello; "再见" (zàijiàn) means goodbye.',
    "これは「テスト」です。本当に!!",
    "안녕하세요, 中國!",
    '    "个性": "大胆,现代",\n    "颜色...": [\n        "红,黄",\n        "蓝"\n    ]',
    "开始光合作用：\n    absorb(光)\n    fix_carbon(二氧化碳, ATP) -> 葡萄糖, 氧气",
    "账户信息：\n    类型：银行账户\n    实例变量：余额\n      私有：是",
    "['18', '威利·格林', '匹兹堡海盗']。",
    "if 条件:\n    数组[i] = 甲, 乙;",
    "#include <stdio.h>  // 头文件,必需",
    "SELECT 姓名,年龄 FROM 表 WHERE 年龄>3;",
    "font-family: Arial, 宋体;",
    "$ git commit -m 修复,完善",
    "~~~\n注释,不要改!!!\n~~~",
    '![图片](图.png "标题")',
    "集合{甲,乙}与调用foo(甲,乙)。",
    "公式$x, \\text{当 a,b 时}$很好。",
    "[1] 张三. 书名[M]. 北京: 出版社, 2010: 12-15.",
    "步骤1：3个人一组，将5加1：5 + 1 = 6。",
    "比分3：2。",
    "共有n!种排列，5!等于120。",
    "数列1，2，…，n。",
    "glob里[…]是一个字。",
    "变量在::http 名字空间里。",
    "use \ufffd (U+FFFD) for it",
    '    打印("正数,好")',
    'puts "你好,世界"',
    "ヽ(✿ﾟ▽ﾟ)ノ",
    "不是学习指导:-)值得注意。",
    "用法：[主机名:]文件 [菜单-项目...]",
    "十一. 概述",
    "约翰．史密斯说：硬盘分成块－一些区域。",
    "以'@','+'和'&'开始的名称，匹配\"*\"和\"?\"。",
    "使用 `a' `b' 或 `i' 等修饰符。",
    "“他说\"好\"吧。”",
    "“你好\"他说\"再见”",
    "毕昇、哪吒、束脩，拚却醉颜红，一坏就修，显示覆铜。",
    "山园小梅二首其一林逋",
    "指纹阅读器和智能卡",
    "一别如斯，落尽梨花。秦竹村",
    "（可能会有一些，非软件包名",
    "关注公众号的人越来越多了。",
    "扫一扫他的二维码就可以了。",
    "\U0001f642\u200d\u2194\ufe0f摇头，\U0001f426\u200d\u2b1b乌鸦。",
]  # fmt: skip


@pytest.mark.parametrize("before, after", CHANGED)
def test_a_golden_pair(before, after):
    assert clean_text(before) == after
    assert clean_text(after) == after


@pytest.mark.parametrize("text", UNCHANGED)
def test_what_is_right_stays(text):
    assert clean_text(text) == text


# --- 2. properties over random strings -----------------------------------------------------------------------

PIECES = [
    *"if {'甲': [\"乙\",'丙'] f(甲,乙) \\text{甲,乙} $$ 1，2，…，n 甲．乙． 甲－乙 :-) 안 の 12：30 1：3 拚 ~~~ [M]. ( ) \t\tf(x) 十一.".split(" "),
    *"“他说\"你好\"吧” (甲(乙)丙) （甲(乙) '70年".split(), "the quick brown fox ", "GNU is not ",
    *"，。！？；：、“”‘’（）《》「」『』…—～·,.!?;:'\"()[]{}<>=+*/\\`$#&@|-~%^_aB3z9你好世界的国說臺灣頭髮乾",
    *"\n\n \t\u3000\xa0\u200b\u200d\ufffd\x85\u2028Ａ５％＂＇．＃＄｀＜＞｡､⼈ｶﾞé①²カ\U0001f600",
    *"... ``` http:// a@b.c &nbsp; print( def 第一章 版权所有 点击查看更多 责任编辑 -- 1. 。。 ？！".split(),
    *"\"你好\" '好' “好 好” <a$href=\" </a> // /* $x$ ，， ：： —— (好) [好](说) 《我》 【你】 好. 5：5 今天天气很好，我们去公园玩".split(),
    "\r\n", "  ", "# ", "今天天气很好".encode().decode("latin-1"),
]  # fmt: skip


def random_text(rng):
    return "".join(rng.choices(PIECES, k=rng.randint(1, rng.choice([4, 8, 16, 40, 80]))))


@functools.cache
def simple(character):
    return clean._converter().convert(character)


def content(text):
    """What must survive: Han, letters and digits, each in its simplified and compatible form."""
    return re.sub(r"[\W_]", "", "".join(map(simple, unicodedata.normalize("NFKD", text))))


@pytest.mark.parametrize("seed", range(8))
def test_cleaning_twice_is_cleaning_once(seed):
    rng = random.Random(seed)
    for _ in range(1000):
        text = random_text(rng)
        once = clean_text(text)
        assert clean_text(once) == once, repr(text)


def test_cleaning_twice_is_cleaning_once_with_any_rule_off():
    rng = random.Random(1)
    for off in clean.TEXT_RULES:
        for _ in range(150):
            once = clean_text(text := random_text(rng), frozenset([off]))
            assert clean_text(once, frozenset([off])) == once, (off, text)


@pytest.mark.parametrize("seed", range(4))
def test_no_han_letter_or_digit_is_lost_or_moved(seed):
    """All rules but the two that may remove text: whole boilerplate lines, and bytes that were misread."""
    rng, off = random.Random(seed), frozenset(["boilerplate", "mojibake"])
    for _ in range(1000):
        text = random_text(rng)
        assert content(clean_text(text, off)) == content(text), repr(text)


def test_boilerplate_removes_whole_lines_only():
    rng = random.Random(5)
    lines = ["点击查看更多", "责任编辑：张三", "版权所有 © 某网", "分享到：微信 QQ"]
    for _ in range(200):
        body = [sentence(rng) for _ in range(3)]
        mixed = body + rng.sample(lines, 2)
        rng.shuffle(mixed)
        assert clean_text("\n".join(mixed)) == "\n".join(x for x in mixed if x in body)


@pytest.mark.parametrize("seed", range(3))
def test_ascii_text_never_changes(seed):
    rng = random.Random(seed)
    for _ in range(2000):
        text = "".join(chr(rng.randint(32, 126)) for _ in range(rng.randint(1, 60)))
        assert clean_text(text) == text


def test_code_with_chinese_in_strings_and_comments_never_changes():
    rng = random.Random(3)
    strings = ["你好,世界...", "他说:(好)!!", "「引」", "ＡＢＣ　臺灣", "a;b?你"]
    shapes = ["x = '{}'", 'print("{}")', 'f({{"k": "{}"}});  // {}', "if a == '{}':  # {}", "return \"{}\"  # {}", "foo();  /* {} */"]  # fmt: skip
    for _ in range(500):
        line = " " * rng.choice([0, 4]) + rng.choice(shapes).format(rng.choice(strings), rng.choice(strings))
        assert clean_text(line) == line
    body = "\n".join(rng.choices(strings, k=20))
    assert clean_text(f"```\n{body}\n```") == f"```\n{body}\n```"


def test_right_chinese_text_never_changes():
    rng = random.Random(4)
    for _ in range(300):
        text = "\n".join(story(rng, 3) for _ in range(3))
        assert clean_text(text) == text


def test_a_rule_can_be_switched_off():
    text = "臺灣,很好。。"
    assert clean_text(text) == "台湾，很好。"
    assert clean_text(text, frozenset(["simplify"])) == "臺灣，很好。"
    assert clean_text(text, frozenset(["repeats", "punctuation"])) == "台湾,很好。。"
    assert clean_text(text, frozenset(clean.TEXT_RULES)) == text


def test_honest_latin_text_is_no_mojibake():
    text = "Le café, à Paris — «très bien», naïve Ångström über 30 °C ½ £5."
    assert clean_text(text) == text


# --- 3. filters ----------------------------------------------------------------------------------------------


def dropped_by(tmp_path, documents, **options):
    rng = random.Random(0)
    path = write_jsonl(tmp_path / "in.jsonl", [story(rng), *documents])
    _, report = run_clean(tmp_path, path, off="near_duplicates", **options)
    return {n: report["rules"][n]["documents"] for n in clean.FILTERS if report["rules"][n]["documents"]}


def test_every_filter_drops_what_it_names_and_counts_it(tmp_path):
    rng = random.Random(7)
    (tmp_path / "words.txt").write_text("赌博网站\nCasino\n", "utf-8")
    bad = [
        story(rng)[:100] + "\ufffd" * 3 + "锟斤拷" + story(rng)[:100],
        "太短。",
        story(rng, 400),
        "This is English text, and nothing else is in it.",
        "天地玄黄宇宙洪荒日月盈昃" + "■□▲|" * 20,
        "\n".join([sentence(rng)] * 4),
        "".join([sentence(rng), sentence(rng)] * 5),
        story(rng) + "欢迎来赌博网站。",
        story(rng) + "CASINO 真好。",
    ]
    found = dropped_by(tmp_path, bad, keywords=str(tmp_path / "words.txt"), max_chars=8000)
    assert found == {"damaged": 1, "length": 2, "han_share": 1, "symbol_share": 1, "repeated_lines": 1, "repeated_grams": 1, "keywords": 2}  # fmt: skip


def test_a_filter_can_be_switched_off_or_loosened(tmp_path):
    english = ["This is English text, and nothing else is in it."]
    assert dropped_by(tmp_path / "a", english) == {"han_share": 1}
    assert dropped_by(tmp_path / "b", english, min_han=0.0) == {}
    path = write_jsonl(tmp_path / "in.jsonl", english)
    assert run_clean(tmp_path / "c", path, off="han_share")[0] == english


def test_perplexity_removes_shuffled_characters_and_keeps_text(tmp_path):
    rng = random.Random(2)
    sample = write_jsonl(tmp_path / "sample.jsonl", [story(rng) for _ in range(200)])
    good = [story(rng) for _ in range(100)]
    bad = ["".join(rng.sample(text, len(text))) for text in good]
    path = write_jsonl(tmp_path / "in.jsonl", [x for pair in zip(good, bad) for x in pair])
    kept, report = run_clean(tmp_path, path, ppl_sample=str(sample), off="near_duplicates")
    assert len(set(kept) & set(good)) >= 97 and len(set(kept) - set(good)) == 0
    assert report["rules"]["perplexity"]["documents"] == 200 - len(kept)
    assert 1 < report["max_ppl"] < 100


def test_the_character_model_is_a_distribution():
    """Witten-Bell probabilities of all characters after any history add up to one, plus nothing for the unseen."""
    rng = random.Random(0)
    text = "".join(rng.choices("天地玄黄", k=300))
    model = clean.CharModel([text])
    for history in ("天地", "黄黄", "无天", "无无"):
        nll = [model.nll(history + c) * 3 - model.nll(history) * 2 for c in "天地玄黄\n"]
        assert 0.95 < np.exp(-np.array(nll)).sum() <= 1 + 1e-9


# --- 4. de-duplication ---------------------------------------------------------------------------------------


def labels_of(texts, threshold=0.7):
    sigs = clean.signatures([clean.comparable(t) for t in texts])
    alive = np.arange(len(texts))
    return clean.near_duplicates(sigs, alive, np.zeros(len(texts), np.int64), threshold)


def test_planted_near_duplicates_are_found_and_only_they():
    rng = random.Random(0)
    texts, positive, negative = [], [], []
    while len(positive) < 300 or len(negative) < 300:
        a = random_han(rng, rng.randint(80, 300))
        b = edited(rng, a, rng.choice([0.005, 0.01, 0.02, 0.03, 0.08, 0.1]))
        j = jaccard(a, b)
        group = positive if j >= 0.75 else negative if 0.3 <= j <= 0.55 else None
        if group is not None:
            group.append(len(texts))
            texts += [a, b]
    label = labels_of(texts)
    found = sum(label[i] == label[i + 1] for i in positive)
    wrong = sum(label[i] == label[i + 1] for i in negative)
    assert found / len(positive) >= 0.95 and found / (found + wrong) >= 0.95
    assert len(set(label[::2])) == len(texts) // 2  # texts that have nothing in common stay apart


def test_reordered_characters_are_no_duplicates():
    rng = random.Random(1)
    texts = [random_han(rng, 100) for _ in range(50)]
    texts += ["".join(rng.sample(t, len(t))) for t in texts] + [t[::-1] for t in texts]
    assert len(set(labels_of(texts))) == len(texts)


def test_a_chain_of_near_duplicates_is_one_component():
    """A~B and B~C, though A and C share less than the threshold."""
    rng = random.Random(2)
    a = random_han(rng, 300)
    b = random_han(rng, 30) + a[30:]
    c = b[:-30] + random_han(rng, 30)
    assert jaccard(a, b) > 0.75 and jaccard(b, c) > 0.75 and jaccard(a, c) < 0.7
    other = random_han(rng, 300)
    assert labels_of([a, c, other, b]).tolist() == [0, 0, 2, 0]


def test_a_bucket_larger_than_the_window_becomes_one_component():
    rng = random.Random(3)
    a = random_han(rng, 200)
    copies = [edited(rng, a, 0.005) for _ in range(5 * clean.WINDOW)]
    assert len(set(labels_of(copies))) == 1


def test_union_find_agrees_with_a_search_of_the_graph():
    rng = np.random.default_rng(0)
    for edges in (1, 20, 60, 200):
        pairs = rng.integers(0, 100, (edges, 2))
        parent = np.arange(100)
        for part in np.array_split(pairs, 3):
            clean.join(parent, *part.T)
        want = np.arange(100)
        for _ in range(100):
            for a, b in pairs:
                want[a] = want[b] = min(want[a], want[b])
        assert (parent == want).all()


@pytest.mark.parametrize("threshold", [0.4, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_a_pair_at_the_threshold(threshold):
    r = clean.band_rows(threshold)
    assert 1 - (1 - threshold**r) ** (clean.SLOTS // r) >= 0.99


def test_shingles_are_the_windows_in_order():
    one, two = clean.shingle_hashes("天地玄黄宇宙洪荒"), clean.shingle_hashes("地玄黄宇宙洪荒日")
    assert len(set(one.tolist())) == 4 and (one[1:] == two[:-1]).all() and one[0] not in two
    assert clean.shingle_hashes("黄玄地天宇")[0] not in one
    assert len(clean.shingle_hashes("日月")) == len(clean.shingle_hashes("")) == 1


def test_the_longest_copy_stays_inside_a_source_and_over_all(tmp_path):
    rng = random.Random(4)
    a, b, c = (random_han(rng, 200) + "。" for _ in range(3))
    one = write_jsonl(tmp_path / "one.jsonl", [a, "好" * 3 + a, b, c])
    two = write_jsonl(tmp_path / "two.jsonl", [b[:100] + " " + b[100:], "真的" + c, c])
    off = "repeated_lines,repeated_grams,simplify"
    kept, report = run_clean(tmp_path, one, two, off=off)
    assert kept == ["好好好" + a, b[:100] + " " + b[100:], "真的" + c]
    assert report["rules"]["exact_duplicates"]["documents"] == 1
    assert report["rules"]["near_duplicates"]["documents"] == 3
    kept, _ = run_clean(tmp_path / "off", one, two, off=off + ",near_duplicates,exact_duplicates")
    assert len(kept) == 7


# --- 5. the command ------------------------------------------------------------------------------------------


def test_any_number_of_workers_gives_the_same_folder(tmp_path):
    rng = random.Random(5)
    texts = [story(rng) for _ in range(500)]
    files = [write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "b.txt", tmp_path / "c.jsonl.gz"]
    files[1].write_text("\n\n".join(story(rng) for _ in range(300)), "utf-8")
    files[2].write_bytes(gzip.compress(files[0].read_bytes()))
    one, report = run_clean(tmp_path / "1", *files)
    two, again = run_clean(tmp_path / "2", *files, workers=2)
    assert one == two and report == again
    assert report["rules"]["exact_duplicates"]["documents"] >= 500 and len(one) <= 800
    names = sorted(p.name for p in (tmp_path / "1" / "out").iterdir())
    assert names == ["00000-a.jsonl", "00001-b.jsonl", "00002-c.jsonl", "report.json"]
    assert not (tmp_path / "1/out/00002-c.jsonl").read_bytes()  # all of them stood in a.jsonl


def test_the_report_counts_and_shows_every_rule(tmp_path):
    path = write_jsonl(
        tmp_path / "in.jsonl",
        ["今天天气很好。。。我们去臺灣玩吧。", "天地玄黄，宇宙洪荒，日月盈昃。。", "短"],
    )
    kept, report = run_clean(tmp_path, path)
    assert report["documents"] == {"read": 3, "kept": 2}
    assert report["characters"] == {"read": 34, "kept": sum(map(len, kept))}
    assert list(report["rules"]) == clean.NAMES
    repeats = report["rules"]["repeats"]
    assert repeats["documents"] == 2 and len(repeats["examples"]) == 2
    assert "。。。" in repeats["examples"][0]["before"] and "。。" not in repeats["examples"][0]["after"]
    assert report["rules"]["length"]["examples"] == ["短"]


def test_the_command_runs_and_its_help_names_every_rule(tmp_path):
    rng = random.Random(6)
    path = write_jsonl(tmp_path / "in.jsonl", [story(rng) for _ in range(20)])
    done = run_script(
        "clean.py", path, "--out", tmp_path / "out", "--workers", 1, "--off", "simplify, repeats"
    )
    assert done.returncode == 0, done.stderr
    assert "kept 20 of 20 documents" in done.stdout
    assert json.loads((tmp_path / "out/report.json").read_text("utf-8"))["off"] == ["repeats", "simplify"]
    source = (ROOT / "clean.py").read_text("utf-8")
    for name in clean.NAMES:
        assert re.search(rf"\b{name}\b", source.split('"""')[1]), name


@pytest.mark.parametrize(
    "options, words",
    [
        ({"off": "simplfy"}, "--off simplfy: no such rule; there are mojibake, .*simplify"),
        ({"keywords": "/nowhere.txt"}, "--keywords /nowhere.txt: no such file"),
        ({"threshold": 1.5}, r"--threshold 1.5 must lie in \[0.1, 1\]"),
        ({"min_han": -1.0}, r"--min_han -1.0 must lie in \[0, 1\]"),
        ({"max_ppl": 50.0}, "--max_ppl needs --ppl_sample"),
        ({"workers": -1}, "--workers"),
        ({"ppl_sample": "small.txt"}, "too little to learn from"),
    ],
)
def test_a_mistake_is_explained(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.txt").write_text("只有一句话。", "utf-8")
    path = write_jsonl(tmp_path / "in.jsonl", ["今天天气很好，我们去公园玩。"])
    with pytest.raises(ValueError, match=words):
        run_clean(tmp_path, path, **options)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


def test_a_bad_line_and_an_empty_input_are_explained(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "好"}\n{"text": 3}\n', "utf-8")
    with pytest.raises(ValueError, match=r"bad.jsonl:2: \"text\" is int"):
        run_clean(tmp_path, bad)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n", "utf-8")
    with pytest.raises(ValueError, match="0 documents read"):
        run_clean(tmp_path, empty)
    with pytest.raises(ValueError, match="2 documents read, length dropped 2"):
        run_clean(tmp_path, write_jsonl(tmp_path / "short.jsonl", ["短", "好"]))


@pytest.mark.parametrize("package, rule", [("opencc", "simplify"), ("rensa", "near_duplicates")])
def test_a_missing_package_is_named_with_the_way_round(tmp_path, monkeypatch, package, rule):
    path = write_jsonl(tmp_path / "in.jsonl", ["今天天气很好，我们去公园玩。"])
    clean._converter.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ValueError, match=f"pip install {package}; or go without: --off {rule}"):
        run_clean(tmp_path, path)
    assert run_clean(tmp_path, path, off=rule)[0] == ["今天天气很好，我们去公园玩。"]
