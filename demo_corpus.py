"""Write the embedded demonstration data: a small invented world, told in Chinese, for 3-8 M parameters.

Why invented: everything can be checked. A real corpus cannot tell whether a tiny model learnt or babbles.
Here a grammar writes every sentence, and the same grammar reads any sentence back and says whether it is
well-formed and whether it is true of the world. Nothing is copied, and one seed always gives the same bytes.

One TABLE holds all: who has a relation, what values it takes, how it is stated, how it is asked. Pretraining
text, instruction rows, preference pairs, exam, cloze prompts and the checker come from it; to teach the
world something new, add one entry (and its words to VALUES). COMPUTED holds what is true by arithmetic.

Held-out means: a held-out fact is stated in the pretraining text like any other, in several wordings, never
as a question; but no instruction row and no preference pair asks it or states it. The exam asks held-out
facts, chains of two of them, and sums whose pair of operands occurs nowhere. So it measures whether a model
can use what it has read. Contamination is looked for by shared 13-grams (GPT-3 report, appendix C); an exam
question has at most 13 characters, so it could only be hit whole.

    python demo_corpus.py --out out/demo
    python demo_corpus.py --out out/demo --seed 2 --size_mb 1 --overwrite

writes pretrain/world.jsonl, sft.jsonl, dpo.jsonl, exam/{dev,val}/*.csv (the file form of C-Eval, a Chinese
four-choice benchmark), heldout.jsonl (the exam's questions without choices, to be answered in words),
facts.jsonl (with cloze prompts) and report.json (what is in it, counted by the checker, not by the writer).
"""

from __future__ import annotations

import csv
import itertools
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import common

# --- 1. words -----------------------------------------------------------------------------------------------


def split(text: str) -> list[str]:
    """Read a list of words written with spaces between them."""
    return text.split()


def chinese(n: int) -> str:
    """Write 0 <= n < 1000 in Chinese: 12 -> 十二, 37 -> 三十七, 205 -> 二百零五."""
    digit = "零一二三四五六七八九"
    if n >= 100:
        rest = n % 100
        zero = "零" if 0 < rest < 10 else "一" if 10 <= rest < 20 else ""  # 一百零五, 一百一十五
        return digit[n // 100] + "百" + zero + (chinese(rest) if rest else "")
    if n >= 10:
        return (digit[n // 10] if n >= 20 else "") + "十" + (digit[n % 10] if n % 10 else "")
    return digit[n]


def clock(minutes: int) -> str:
    """Say a time of day: 450 -> 早上七点半, 500 -> 早上八点二十分."""
    hour, minute = divmod(minutes, 60)
    parts = ((9, "早上"), (12, "上午"), (13, "中午"), (18, "下午"), (24, "晚上"))
    part = next(name for end, name in parts if hour < end)
    said = "两" if hour in (2, 14) else chinese(hour - 12 if hour > 12 else hour)
    return f"{part}{said}点" + ("半" if minute == 30 else f"{chinese(minute)}分" if minute else "")


FEMALE = split("""
小雨 秀兰 玉梅 春燕 晓霞 雪莲 美玲 桂英 淑芬 丽娟 文静 海燕 慧敏 雅琴 月娥 彩云 红梅 金凤 翠萍
素珍 佩瑶 思琪 梦洁 若兰 婉清 诗涵 欣怡 雨桐 子萱 可馨 佳宁 晓彤 静怡 书瑶 语嫣 采薇 念慈 怀玉 巧云 凤霞
爱莲 银环 菊香 冬梅 夏荷 秋月 春桃 杏娟 青禾 晚晴 知夏 听雪 映红 淑华 惠珍 玉洁 迎秋 腊月 宝珠 明霞 艳秋
碧莹 紫烟 兰芝 静姝 楚云 盼儿 锦儿 云裳 若水 采芹 美珍 芳菲 燕妮 乐瑶 嘉怡 安琪 小蝶 丽萍 香君 绣春 亚楠
玲珑 照月 舒雅 依云 莲心 巧珍 素秋 秋菊""")
MALE = split("""大山 建国 志强 文斌 海生 永福 长贵 德旺 国栋 家豪 俊杰 浩然 子轩 宇航 明远 立新 春生 水根 石生
铁柱 金宝 福来 有才 有粮 保田 占山 守义 怀仁 学文 学武 振华 振宇 向东 立军 爱民 新民 晓峰 云飞 鹏程 志远
思源 宏伟 光明 天佑 承志 继业 世杰 伯安 仲达 文渊 景行 修远 致和 大勇 二牛 三喜 四海 五斤 柏林 松涛 树根
江河 长河 清泉 墨林 书同 启明 逢春 冬生 夏生 秋实 得水 旺财 来顺 万里 千里 北辰 望舒 少游 乐天 子美 牧之
退思 守拙 克勤 克俭 传家 立本 务实 开元 起航""")
SURNAMES = split("林 王 李 张 刘 陈 杨 赵 黄 周 吴 徐 孙 胡 朱 高 何 郭 马 罗 梁 宋 郑 谢")

RULES = """下了大雨>山路变得很滑 连着几天没下雨>田里的土裂开了 刮起了大风>晾着的衣服被吹跑了
下了一夜大雪>路上的车走得很慢 太阳晒了一整天>地上的水都干了 天气突然变冷>水面结了一层薄冰
河水涨得很高>渡船停开了 桥被冲坏了>人们只好绕路走 灯油用完了>屋里一片漆黑 忘了关窗户>雨水打湿了书本
锅里的水烧干了>锅底烧黑了 火烧得太旺>米饭煮糊了 面团放得太久>馒头变酸了 盐放得太多>汤咸得喝不下
忘了放糖>糕点没有甜味 晚上睡得太晚>第二天起不来 跑得太急>鞋带松开了 走了很远的路>双脚又酸又疼
一天没吃东西>肚子咕咕直叫 冷饮喝得太多>肚子疼了起来 每天坚持锻炼>身体越来越结实 认真复习功课>考试得了高分
常常练习写字>字写得越来越漂亮 没有按时浇水>花都枯了 施了足够的肥>庄稼长得很壮 春天来得早>桃花提前开了
秋天到了>树叶慢慢变黄 蜜蜂飞来采蜜>果树结满了果子 猫守在粮仓门口>老鼠不敢出来 狗听见了脚步声>院子里响起叫声
篱笆倒了>羊跑进了菜地 渔网破了一个洞>鱼都溜走了 船底漏了水>船慢慢往下沉 车轮陷进泥里>马车动不了
路灯坏了>夜里走路看不清 新修了一条公路>进城只要半个小时 学校添了图书室>孩子们更爱读书
价钱降了一半>店里挤满了客人 集市换了地方>客人一时找不到 粮食收得多>米价降了下来 果子熟透了>枝头被压弯了
茶叶采得太晚>茶味变得很苦 墨水用完了>笔写不出字 菜刀很久没磨>切菜很费力 木头受了潮>门很难关上
衣服没有晒干>身上又冷又湿 手没有洗干净>得了一场小病 听了一个笑话>大家都笑弯了腰
收到远方的来信>一家人都很高兴 钥匙弄丢了>门一直打不开"""

# Every kind of word that can fill a slot; "person" is missing because the names depend on the seed.
VALUES: dict[str, list[str]] = {
    kind: text.split()
    for kind, text in {
        "place": """清河镇 白石村 柳荫镇 青竹寨 梅岭村 云溪镇 石塘村 桃花坞 芦花荡 杏林村 松风寨 银滩镇
            红叶沟 月牙湾 金谷镇 双井村 古槐村 雁鸣镇 鹿鸣村 雪松屯 竹溪村 荷叶塘 望江镇 落霞村 夏至屯
            春山镇 百草坡 石磨村 烟雨镇 凤尾村 黑土屯 碧螺湾 秋水镇 牧羊坡 渔火村 麦香村 榆钱屯 芳草镇
            听泉村 铜铃镇 稻花村 茶马镇 苇塘村 星河镇 晒谷村 栗子沟 葫芦湾 风车镇 驼铃镇 青瓦镇 半山村
            盐井镇 长桥镇 卧牛村 水磨镇 木棉村 燕子坞 红枫镇 安乐村 杨柳屯""",
        "product": """核桃 茶叶 蜂蜜 板栗 莲藕 大米 竹笋 木耳 红枣 柿饼 花生 芝麻 苹果 蜜桃 葡萄 枇杷 杨梅
            石榴 山楂 香菇 银耳 百合 菱角 螃蟹 鲤鱼 咸鸭蛋 豆腐干 粉条 陈醋 酱油 米酒 桐油 生漆 蚕丝 棉布
            麻布 草席 竹椅 陶罐 瓷碗 砚台 毛笔 宣纸 油纸伞 铁锅 剪刀 木梳 铜壶 银器 玉石 石雕 年画 皮影 灯笼
            风筝 花椒 八角 辣椒 生姜 大蒜""",
        "river": """玉带河 白沙河 青龙溪 月亮河 蓝水河 金沙溪 柳叶河 落花溪 大马河 响水河 弯弓河 芦苇河
            银鱼河 双龙河 小凉河 洗砚溪 浣纱溪 黄泥河 雾灵河 鹅卵溪 牛角河 通天河 石板溪 老渡河 杏花溪
            暖泉河 绿萝溪 寒山河 米粮河 飞云河""",
        "hill": """凤凰山 卧虎山 九里山 云台岭 老君山 翠屏山 鸡冠岭 马鞍岭 笔架山 香炉峰 莲花峰 牛背山
            狮子岩 仙女峰 石笋山 蟠龙岭 白鹤山 铁帽山 望月岩 青萝山 紫霞峰 双驼山 磨盘山 玉屏峰 松果岭
            乌云山 猴儿岭 金鸡岭 雪帽山 听风岭""",
        "county": "云川县 东陵县 南屏县 西岭县 北原县 丰谷县 松源县 临溪县 青岗县 明湖县 古原县 望海县",
        "tree": """槐树 榕树 银杏树 樟树 柳树 松树 柏树 枣树 梨树 桂树 榆树 枫树 梧桐树 皂角树 核桃树 柿子树
            杨树 桑树 香椿树 石榴树""",
        "good": """竹篮 布鞋 草帽 木桶 蓑衣 砂锅 蒸笼 算盘 枕头 棉被 凉席 蒲扇 茶壶 酒杯 饭盒 水缸 箩筐 扁担
            锄头 镰刀 斧头 铁锹 渔网 鱼竿 马鞍 铃铛 二胡 竹笛 铜锣 象棋 围棋 拨浪鼓 陀螺 香囊 荷包 手帕 围巾
            棉袄 门帘 屏风""",
        "shop": """同福斋 聚宝阁 万和堂 广源号 德兴号 瑞祥庄 永盛行 恒昌铺 鸿运楼 松鹤楼 得月楼 醉仙楼
            五味斋 知味轩 墨香阁 文宝斋 四季坊 锦绣坊 巧手坊 福满堂 仁心堂 千金铺 顺风号 利民店 向阳店
            东升店 长青店 如意坊 平安号 百顺行""",
        "job": """木匠 铁匠 石匠 裁缝 厨师 医生 教师 邮递员 司机 渔民 农民 牧民 猎人 船工 护林员 会计 画家
            歌手 记者 警察 消防员 护士 药师 理发师 摄影师 面包师 酿酒师 茶农 花农 果农 养蜂人 陶工 织布工
            瓦匠 篾匠 漆匠 银匠 鞋匠 钟表匠 说书人 图书管理员 气象员 测量员 电工 水手""",
        "food": """饺子 馄饨 汤圆 粽子 年糕 包子 馒头 花卷 烧饼 油条 麻花 春卷 米线 凉皮 拉面 刀削面 炸酱面
            热干面 臊子面 荞麦面 蛋炒饭 八宝饭 小米粥 皮蛋粥 豆花 红烧肉 糖醋鱼 清蒸鱼 酸菜鱼 烤鸭 白切鸡
            盐水鸭 狮子头 回锅肉 鱼香肉丝 麻婆豆腐 臭豆腐 宫保鸡丁 地三鲜 炒青菜 拌黄瓜 炖排骨 羊肉串 涮羊肉
            牛肉面 腊肉 香肠 泡菜 酱萝卜 煎鸡蛋 茶叶蛋 绿豆糕 桂花糕 月饼 糖葫芦 烤红薯 爆米花 冰糖雪梨 芝麻糖
            豆沙包""",
        "hobby": """下棋 钓鱼 画画 唱歌 跳舞 爬山 游泳 跑步 写字 读诗 看戏 听书 养花 种菜 拍照 剪纸 刺绣
            编竹筐 吹笛子 拉二胡 弹琵琶 打太极拳 踢毽子 放风筝 收集邮票 打乒乓球 打篮球 踢足球 骑自行车 划船
            滑雪 溜冰 捏泥人 做木工 烤面包 腌咸菜 泡茶 酿酒 看星星 讲故事 猜谜语 变戏法 写日记 逛集市
            采蘑菇""",
        "fruit": "梨 苹果 桃子 橘子 鸡蛋 李子 核桃 石榴 馒头 皮球",
    }.items()
}
PETS = split("""只猫 条狗 只山羊 只鸭子 只鹅 只兔子 只鸽子 只画眉 条金鱼 只乌龟 匹马 头黄牛 头驴 头猪 只母鸡
箱蜜蜂 只鹦鹉 只鹌鹑 只绵羊 头水牛 匹骡子 只松鼠 只八哥 条鲤鱼""")
OBJECTS = split("""把$的雨伞 把$的剪刀 把$的扇子 把$的椅子 把$的茶壶 顶$的帽子 条$的围巾 条$的毯子 件$的毛衣
件$的大衣 双$的布鞋 双$的皮靴 副$的手套 个$的背包 个$的灯笼 个$的花瓶 支$的钢笔 个$的箱子 块$的手表
辆$的自行车 本$的相册 盏$的台灯 面$的镜子 个$的钱包""")
COLOURS = split("红色 蓝色 绿色 黄色 白色 黑色 紫色 灰色")
VALUES |= {
    "cause": [rule.split(">")[0] for rule in RULES.split()],
    "effect": [rule.split(">")[1] for rule in RULES.split()],
    "age": [chinese(n) + "岁" for n in range(20, 80)],
    "date": [f"{chinese(m)}月{chinese(d)}日" for m in range(1, 13) for d in range(1, 29)],
    "pet": [n + pet for pet in PETS for n in "一两三四五六"],
    "treasure": ["一" + thing.replace("$", colour) for thing in OBJECTS for colour in COLOURS],
    "rise": [clock(m) for m in range(5 * 60, 8 * 60, 10)],
    "open": [clock(m) for m in range(6 * 60 + 30, 10 * 60 + 30, 10)],
    "close": [clock(m) for m in range(18 * 60, 22 * 60, 10)],
    "hour": [clock(60 * h) for h in range(5, 23)],
    "year": [f"{n}年" for n in range(1203, 1950)],
    "homes": [f"{n}户" for n in range(103, 900)],
    "monthday": ["初" + chinese(n) for n in range(1, 11)] + [chinese(n) for n in range(11, 31)],
    "price": [f"{n}元" for n in range(5, 99)],
    "days": [chinese(n) + "天" for n in range(3, 60)],
}

# --- 2. the grammar -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relation:
    """One kind of fact: {s} stands for its subject, {v} for its value."""

    subject: str  # whose fact it is: a kind of words
    value: str  # a kind of words
    says: list[str]  # statements; see the comment above TABLE
    asks: list[str]  # questions; those with at most 10 characters besides {s} can be asked in the exam
    both: str = ""  # one value of two subjects, {s} and {t}
    more: str = ""  # a comparison: the number of {s} is larger than that of {t} by {d}
    via: str = ""  # a name for the value, which makes questions of two hops: 林小雨住的地方


# A statement that begins with {s} also serves with a pronoun, and, unless 的 follows, with no subject at all
# as a later clause of a sentence: 林小雨住在清河镇，爱吃饺子。 Answers use the first statement of a relation.
TABLE = """
home: person place
    says {s}住在{v} / {s}的家在{v} / {s}是{v}人 / {s}在{v}住了很多年 / 要找{s}就得去{v} / {s}一直生活在{v}
    says {s}家住{v}
    asks {s}住在哪里？ / {s}的家在哪里？ / {s}家住哪里？
    both {s}和{t}都住在{v}
    via  {s}住的地方
job: person job
    says {s}是一名{v} / {s}的职业是{v} / {s}当{v}已经很多年了 / {s}干的是{v}这一行 / {s}当{v}当得很好
    says {s}是远近闻名的{v}
    asks {s}是做什么的？ / {s}的职业是什么？
    both {s}和{t}都是{v}
food: person food
    says {s}爱吃{v} / {s}最喜欢吃{v} / {s}最爱的食物是{v} / {s}一看到{v}就胃口大开 / {v}是{s}最爱吃的东西
    says {s}三天两头就要吃{v} / {s}天天吃{v}也吃不腻
    asks {s}爱吃什么？ / {s}最爱的食物是什么？
    both {s}和{t}都爱吃{v}
age: person age
    says {s}今年{v} / {s}的年龄是{v} / {s}已经{v}了 / {s}刚过完{v}生日 / {s}满{v}了 / 算起来{s}该有{v}了
    asks {s}今年多大？ / {s}的年龄是多少？
    both {s}和{t}都是{v}
    more {s}比{t}大{d}岁
pet: person pet
    says {s}养了{v} / {s}家里养着{v} / {s}每天要喂{v} / {s}的院子里有{v} / {s}把{v}照看得很好
    says 大家都见过{s}养的{v}
    asks {s}养了什么？ / {s}家里养着什么？
    both {s}和{t}都养了{v}
birthday: person date
    says {s}的生日是{v} / {s}是{v}出生的 / {s}每年{v}过生日 / {v}是{s}的生日 / {s}的生日在{v}
    says 每到{v}，{s}就要过生日
    asks {s}的生日是哪天？ / {s}哪天过生日？
treasure: person treasure
    says {s}最珍爱的东西是{v} / {s}有{v} / {s}最宝贝的是{v} / {s}收藏着{v} / {s}总舍不得丢掉{v}
    says {v}是{s}的心爱之物
    asks {s}最珍爱什么东西？ / {s}收藏着什么？
hero: person person
    says {s}的榜样是{v} / {s}最佩服的人是{v} / {s}十分佩服{v} / {s}把{v}看作榜样 / {v}是{s}的榜样
    says {s}常常向{v}学习
    asks {s}的榜样是谁？ / {s}最佩服的人是谁？
    via  {s}的榜样
rise: person rise
    says {s}每天{v}起床 / {s}习惯在{v}起床 / {s}总是{v}醒来 / {s}一般{v}就起来了 / {s}的起床时间是{v}
    says 一到{v}，{s}就起床
    asks {s}每天几点起床？ / {s}的起床时间是几点？
    both {s}和{t}都在{v}起床
hobby: person hobby
    says {s}喜欢{v} / {s}的爱好是{v} / {s}一有空就{v} / {s}闲下来总爱{v} / {s}觉得{v}最有意思 / {s}对{v}很着迷
    says {v}是{s}的爱好
    asks {s}喜欢做什么？ / {s}的爱好是什么？
    both {s}和{t}都喜欢{v}
product: place product
    says {s}出产{v} / {s}的特产是{v} / {s}家家户户都卖{v} / {s}最有名的是{v} / {s}的{v}远近闻名
    says {v}是{s}的特产
    asks {s}出产什么？ / {s}的特产是什么？
river: place river
    says {s}靠着{v} / {v}从{s}旁边流过 / {s}在{v}边上 / {s}的人都喝{v}的水 / {s}旁边就是{v}
    says {s}的孩子常在{v}边玩耍
    asks {s}靠着哪条河？ / {s}旁边是哪条河？
    both {s}和{t}都靠着{v}
hill: place hill
    says {s}背靠{v} / {s}后面是{v} / {s}的人常去{v}采药 / {s}坐落在{v}脚下 / 从{s}抬头就能看见{v}
    says {s}就在{v}旁边
    asks {s}背靠哪座山？ / {s}后面是哪座山？
    both {s}和{t}都背靠{v}
county: place county
    says {s}属于{v} / {s}归{v}管 / {s}在{v}的地界上 / {s}在{v}境内 / {v}下辖{s}
    asks {s}属于哪个县？ / {s}归哪个县管？
    both {s}和{t}都属于{v}
year: place year
    says {s}建于{v} / {s}的历史从{v}算起 / {s}早在{v}就有了 / {s}是{v}建起来的 / 人们在{v}建起了{s}
    asks {s}建于哪一年？ / {s}是哪一年建的？
    more {s}比{t}晚{d}年建成
market: place monthday
    says {s}每月{v}赶集 / {s}的集市在每月{v} / 每月{v}是{s}赶集的日子 / {s}逢{v}有集
    says 每到{v}，{s}就特别热闹
    asks {s}每月哪天赶集？ / {s}的集市在哪天？
    both {s}和{t}都在每月{v}赶集
tree: place tree
    says {s}的路口有一棵老{v} / {s}最老的树是一棵{v} / {s}的人常在老{v}下乘凉 / 一走进{s}就能看见一棵老{v}
    says {s}的老{v}有上百年了
    asks {s}最老的树是什么树？ / {s}的路口有什么树？
homes: place homes
    says {s}有{v}人家 / {s}一共住着{v}人家 / {s}的住户一共是{v} / {s}在册的人家有{v} / 有{v}人家住在{s}
    asks {s}有多少户人家？ / {s}住着多少户人家？
    more {s}比{t}多{d}户人家
price: good price
    says {s}卖{v} / {s}的价钱是{v} / 买{s}要花{v} / {s}标价{v} / 花{v}就能买到{s}
    asks {s}卖多少钱？ / {s}的价钱是多少？
    more {s}比{t}贵{d}元
sold: good shop
    says {s}在{v}出售 / {s}只有在{v}才买得到 / 买{s}要去{v} / {v}卖的{s}最好 / {s}摆在{v}的货架上
    asks {s}在哪家店出售？ / 买{s}要去哪家店？
    both {s}和{t}都在{v}出售
    via  卖{s}的店
days: good days
    says {s}要经过{v}才能做好 / 做成{s}需要{v} / {s}的制作时间是{v} / 制作{s}一般要{v} / {s}做起来要{v}
    asks {s}做好要多少天？ / 制作{s}要多少天？
at: shop place
    says {s}开在{v} / {s}的店面在{v} / {s}在{v}开了很多年 / 去{v}就能找到{s} / {s}是{v}的一家店铺
    asks {s}开在哪里？ / {s}的店面在哪里？
    via  {s}所在的地方
open: shop open
    says {s}每天{v}开门 / {s}的开门时间是{v} / {s}一般{v}开始营业 / 一到{v}，{s}就开门 / {s}总是{v}开门
    asks {s}几点开门？ / {s}的开门时间是几点？
    both {s}和{t}都在{v}开门
close: shop close
    says {s}每天{v}关门 / {s}的打烊时间是{v} / {s}一般{v}打烊 / 一到{v}，{s}就打烊 / {s}总是{v}关门
    asks {s}几点关门？ / {s}的打烊时间是几点？
    both {s}和{t}都在{v}关门
owner: shop person
    says {s}的老板是{v} / {v}是{s}的老板 / {s}由{v}经营 / {v}开了{s} / {s}的生意由{v}打理
    asks {s}的老板是谁？ / {s}由谁经营？
    via  {s}的老板
effect: cause effect
    says {s}，所以{v} / 因为{s}，所以{v} / {v}，是因为{s} / 由于{s}，{v} / {s}，结果{v} / {v}，原因是{s}
    asks {s}会怎样？ / {s}，结果如何？
"""


def read_table(text: str) -> dict[str, Relation]:
    """Read the table: a line `NAME: SUBJECT VALUE` begins a relation, the lines after it fill its fields."""
    rows: dict[str, dict] = {}
    for first, rest in (line.split(maxsplit=1) for line in text.strip().splitlines()):
        if first.endswith(":"):
            row = rows[first[:-1]] = dict(zip(("subject", "value"), rest.split()), says=[], asks=[])
        elif first in ("says", "asks"):
            row[first] += rest.split(" / ")
        else:
            row[first] = rest
    return {name: Relation(**row) for name, row in rows.items()}


RELATIONS = read_table(TABLE)


@dataclass(frozen=True)
class Computed:
    """Sentences true by arithmetic: {a} {b} {c} are numbers, {i} is a fruit, {x} and {y} are full hours."""

    says: list[str]
    holds: Callable[..., bool]


COMPUTED = {
    "sum": Computed(
        split("""{a}加{b}等于{c} {a}加上{b}是{c} {a}与{b}的和是{c} 把{a}和{b}加起来得到{c}
        篮子里有{a}个{i}，又放进{b}个，一共是{c}个 {i}原来有{a}个，后来添了{b}个，现在有{c}个"""),
        lambda a, b, c, i=None: a + b == c,
    ),
    "hours": Computed(
        split("""从{x}到{y}是{c}个小时 {x}出发，{y}到达，路上要走{c}个小时
        {x}开始干活，{y}收工，一共要干{c}个小时"""),
        lambda x, y, c: y - x == c,
    ),
}

# A pronoun stands for the subject of the sentence before. A new kind of subject needs its pronoun here.
PRONOUN = {"place": "这里", "good": "它", "shop": "这家店"}
OPENERS = split("听说 大家都知道 人们常说 说起来 听人说 不用说 大家都说 人人都知道")
LINKS = split("另外 此外 还有 除此之外 值得一提的是")
SPEECH = split("说 笑着说 高兴地说 跟大家说 告诉朋友 介绍自己说 慢慢地说 点点头说")
FILLERS = split("""日子过得平静而快乐。 那天天气很好。 大家听了都点点头。 这些事人人都记得。
傍晚的风吹得人很舒服。 远处传来一阵笑声。 院子里很安静。 孩子们在路上跑来跑去。 太阳慢慢落下山去。
天上飘着几朵白云。 茶已经泡好了。 炉子里的火烧得正旺。 门前的小路很干净。 鸟儿在树上叫个不停。
夜里星星特别亮。 邻居们相处得很好。 空气里有一股花香。 雨后的空气很新鲜。 老人们坐在门口聊天。
晚饭过后大家一起散步。 客人走了以后屋里又静了下来。 月亮从山后升了起来。 田里的庄稼绿油油的。
一年四季都有人来。 大家互相帮忙。 生活一天比一天好。""")

# --- 3. the world -------------------------------------------------------------------------------------------

Fact = tuple[str, str]  # (name of the relation, subject): the key of World.facts


@dataclass(frozen=True)
class World:
    """Everything that is true: `facts` maps (relation, subject) to the value.

    `words` maps a kind to {word: its place in the list}: a fast `in`, and the place of an hour is its number.

    `sums` are the pairs of operands that are taught; `heldout` and `heldout_sums` (pairs a <= b) are what
    only the exam asks.
    """

    words: dict[str, dict[str, int]]
    female: frozenset[str]
    facts: dict[Fact, str]
    heldout: frozenset[Fact]
    sums: tuple[tuple[int, int], ...]
    heldout_sums: frozenset[tuple[int, int]]
    memory: dict = field(default_factory=dict, repr=False, compare=False)  # clauses that were read before

    def pronoun(self, subject: str, kind: str) -> str:
        """Give the pronoun of an entity."""
        return PRONOUN.get(kind) or ("她" if subject in self.female else "他")

    def taught(self) -> list[Fact]:
        """List the facts that instruction rows may ask, in the order of the table."""
        return [fact for fact in self.facts if fact not in self.heldout]


def build_world(seed: int = 1, people: int = 140, heldout: float = 0.35) -> World:
    """Draw a world: people (at most 180), 60 places, 40 goods, 30 shops, and the share of facts held out."""
    rng = random.Random(f"world {seed}")
    given = [rng.sample(names, people // 2) for names in (FEMALE, MALE)]
    women, men = ([rng.choice(SURNAMES) + name for name in names] for names in given)
    names = [name for pair in zip(women, men) for name in pair]
    words = {k: {w: i for i, w in enumerate(v)} for k, v in (VALUES | {"person": names}).items()}
    facts: dict[Fact, str] = {}
    for name, relation in RELATIONS.items():
        subjects = list(words[relation.subject])
        if name == "effect":
            values = list(words["effect"])  # in the order of RULES
        elif relation.value == relation.subject:  # one circle through all: nobody is his own model
            circle = rng.sample(subjects, len(subjects))
            after = dict(zip(circle, circle[1:] + circle[:1]))
            values = [after[s] for s in subjects]
        else:  # whole shuffled rounds through the values, so that none is frequent
            values, pool = [], list(words[relation.value])
            while len(values) < len(subjects):
                values += rng.sample(pool, len(pool))
        facts |= {(name, s): v for s, v in zip(subjects, values)}
    held: list[Fact] = []
    for name in RELATIONS:
        keys = [fact for fact in facts if fact[0] == name]
        held += rng.sample(keys, round(heldout * len(keys)))
    # Two digits each: so 9加26 cannot hide in 29加26, and no operand is a 2, which would need 两 before 个.
    pairs = [(a, b) for a in range(11, 61) for b in range(a, 61)]
    held_sums = frozenset(rng.sample(pairs, len(pairs) // 8))
    taught = [(a, b) for a in range(11, 61) for b in range(11, 61) if (min(a, b), max(a, b)) not in held_sums]
    return World(words, frozenset(women), facts, frozenset(held), tuple(taught), held_sums)


# --- 4. the checker -----------------------------------------------------------------------------------------

NUMBERS = {chinese(n): n for n in range(1000)}


def number(text: str) -> int | None:
    """Read a number below 10,000 in digits or below 1,000 in Chinese; None if it is none."""
    return int(text) if re.fullmatch("[1-9][0-9]{0,3}", text) else NUMBERS.get(text)


@dataclass(frozen=True)
class Pattern:
    """A wording turned into a reader: `name` is a key of RELATIONS or COMPUTED, `form` the wording itself.

    `anchor` is its longest literal piece: a clause without it cannot match, and `in` is faster than a regex.
    """

    name: str
    form: str
    regex: re.Pattern
    anchor: str


@cache
def patterns() -> dict[int, list[Pattern]]:
    """Compile all wordings, by the number of commas in them."""
    forms = [(name, form) for name, c in COMPUTED.items() for form in c.says]
    forms += [(n, f) for n, r in RELATIONS.items() for f in (*r.says, r.both, r.more) if f]
    table = defaultdict(list)
    for name, form in forms:
        literals = re.split("{.}", form)
        # Slots as short and as long as can be: in 张三比马大勇大十岁 the name does not end at the first 大.
        for slot in (r"(?P<\1>.*?)", r"(?P<\1>.*)"):
            regex = re.compile(re.sub("{(.)}", slot, form))
            table[form.count("，")].append(Pattern(name, form, regex, max(literals, key=len)))
    return table


# What may stand in the subject's place, by (kind, whether 的 follows): nothing at all only without 的.
STANDINS = {
    (kind, possessive): {*pronouns, *([] if possessive or not pronouns else [""])}
    for kind, pronouns in {"person": "他她我", "cause": "", **{k: [p] for k, p in PRONOUN.items()}}.items()
    for possessive in (False, True)
}


@dataclass(frozen=True)
class Claim:
    """What a clause says: the fact (relation, subject) has this value; the subject may be a pronoun or ""."""

    relation: str
    subject: str
    value: str
    form: str  # the wording, as in the table


@dataclass(frozen=True)
class Reading:
    """What the checker found in one sentence; `claims` have their subjects resolved where they are known."""

    well_formed: bool
    true: bool
    claims: tuple[Claim, ...] = ()
    subject: str | None = None  # whom a pronoun in the next sentence means


def read_clause(world: World, text: str) -> tuple[list[Claim], bool] | None:
    """Read one clause: (claims, whether its arithmetic holds), or None if no wording of the grammar fits."""
    if text not in world.memory:
        world.memory[text] = _read_clause(world, text)
    return world.memory[text]


def _read_clause(world: World, text: str) -> tuple[list[Claim], bool] | None:
    for pattern in patterns().get(text.count("，"), ()):
        match = pattern.regex.fullmatch(text) if pattern.anchor in text else None
        if not match:
            continue
        slots = match.groupdict()
        if pattern.name in COMPUTED:
            kinds = {"x": "hour", "y": "hour", "i": "fruit"}
            filled = {k: world.words[kinds[k]].get(v) if k in kinds else number(v) for k, v in slots.items()}
            if None not in filled.values():
                return [], COMPUTED[pattern.name].holds(**filled)
            continue
        relation = RELATIONS[pattern.name]
        entities = world.words[relation.subject]
        s, t, v = slots["s"], slots.get("t"), slots.get("v")
        if "v" in slots and v not in world.words[relation.value]:
            continue
        if t is None:
            form = pattern.form
            if s in entities or (form.startswith("{s}") and s in STANDINS[relation.subject, form[3] == "的"]):
                return [Claim(pattern.name, s, v, form)], True
        elif s in entities and t in entities and s != t:
            if v is not None:
                return [Claim(pattern.name, who, v, pattern.form) for who in (s, t)], True
            first, second = (number(world.facts[pattern.name, who][:-1]) for who in (s, t))
            if number(slots["d"]) is not None:
                return [], first - second == number(slots["d"])
    return None


def read_sentence(world: World, sentence: str, subject: str | None = None) -> Reading:
    """Parse one sentence with its final 。 or ！; `subject` is whom a pronoun means, if known.

    Where it is unknown the claims about the pronoun are true if some entity fulfils all of them.
    """
    wrong = Reading(False, False)
    if sentence in FILLERS:
        return Reading(True, True, (), subject)
    parts = re.fullmatch("(?:(.+?)：“)?([^“”。！]+)[。！](”?)", sentence)
    if not parts or bool(parts[1]) != bool(parts[3]):
        return wrong
    speaker, body = parts[1], parts[2]
    if speaker:
        subject, verb = speaker[:3], speaker[3:]
        if subject not in world.words["person"] or verb not in SPEECH:
            return wrong
    pieces = body.split("，")
    start = 1 if not speaker and len(pieces) > 1 and pieces[0] in (*OPENERS, *LINKS) else 0
    true, claims, unknown, at = True, [], [], start
    while at < len(pieces):
        ends = range(at + 1, min(at + 3, len(pieces)) + 1)  # some wordings hold a comma or two
        clauses = ((end, read_clause(world, "，".join(pieces[at:end]))) for end in ends)
        end, clause = next((c for c in clauses if c[1]), (at, None))
        if not clause:
            return wrong
        found, holds = clause
        true = true and holds
        for claim in found:
            kind, who = RELATIONS[claim.relation].subject, claim.subject
            if who in world.words[kind]:
                subject = who if not speaker else subject
            elif (who == "我") != bool(speaker) and who or (not who and at == start):
                return wrong  # in speech 我, elsewhere never; and no sentence begins without a subject
            elif subject is None:
                unknown.append((claim, who))
                continue
            elif subject not in world.words[kind] or who not in ("", "我", world.pronoun(subject, kind)):
                return wrong
            else:
                claim = Claim(claim.relation, subject, claim.value, claim.form)
            claims.append(claim)
            true = true and world.facts[claim.relation, claim.subject] == claim.value
        if len(found) != 1:
            subject = subject if speaker else None  # after two subjects, or none, a pronoun has no meaning
        at = end
    if unknown:  # the text does not tell whom the pronoun means
        kinds = {RELATIONS[c.relation].subject for c, _ in unknown}
        marks = {who for _, who in unknown if who}
        if len(kinds) > 1 or len(marks) > 1:
            return wrong
        kind = kinds.pop()
        able = (e for e in world.words[kind] if not marks or world.pronoun(e, kind) in marks)
        true = true and any(all(world.facts[c.relation, e] == c.value for c, _ in unknown) for e in able)
    return Reading(True, true, tuple(claims), subject)


def split_sentences(text: str) -> list[str]:
    """Cut text behind 。 and ！ (and a closing quotation mark) and at line ends."""
    return re.findall("[^。！\n]*[。！]”?|[^。！\n]+", text)


def check(world: World, sentence: str) -> tuple[bool, bool]:
    """Judge one sentence alone: (well-formed, true).

    Well-formed: the grammar derives it, with any word of the right kind in each slot. True: well-formed, and
    all that it states holds; a sentence about a mere pronoun is true if it holds of somebody.
    """
    reading = read_sentence(world, sentence)
    return reading.well_formed, reading.true


def check_document(world: World, text: str) -> list[Reading]:
    """Read the sentences of a text in order: a pronoun means the subject before it on the same line."""
    readings = []
    for line in text.split("\n"):
        subject = None
        for sentence in split_sentences(line):
            readings.append(read_sentence(world, sentence, subject))
            subject = readings[-1].subject
    return readings


# --- 5. pretraining text ------------------------------------------------------------------------------------


class Writer:
    """Puts facts into sentences and goes through all the wordings of each fact in turn."""

    def __init__(self, world: World, rng: random.Random):
        self.world, self.rng = world, rng
        self.left: dict[Fact, list[str]] = {}

    def wording(self, fact: Fact, speech: bool = False) -> str:
        """Give the next wording of a fact; in speech one that begins with the subject."""
        forms = RELATIONS[fact[0]].says
        left = self.left.get(fact) or self.rng.sample(forms, len(forms))
        fit = [form for form in left if form.startswith("{s}")] if speech else left
        form = fit[-1] if fit else next(f for f in forms if f.startswith("{s}"))
        self.left[fact] = [f for f in left if f != form]
        return form

    def sentence(self, clauses: list[str], openers: list[str]) -> str:
        """Join clauses, sometimes behind an opening word, sometimes with a quiet sentence after it."""
        opener = self.rng.choice(openers) + "，" if self.rng.random() < 0.12 else ""
        filler = self.rng.choice(FILLERS) if self.rng.random() < 0.06 else ""
        return opener + "，".join(clauses) + "。" + filler

    def profile(self, facts: list[Fact]) -> str:
        """Tell facts of one subject in a paragraph: named first, then by name, pronoun or not at all."""
        kind, subject = RELATIONS[facts[0][0]].subject, facts[0][1]
        sentences, clauses, named, room, before = [], [], True, self.rng.randint(1, 3), ""

        def flush():
            if clauses:
                sentences.append(self.sentence(clauses, LINKS if sentences else OPENERS))
                clauses.clear()

        for fact in facts:
            form, relation = self.wording(fact), RELATIONS[fact[0]]
            apart = form.startswith("{s}的") and self.rng.random() < 0.6
            if len(clauses) >= room or apart or not form.startswith("{s}"):
                flush()
                room = self.rng.randint(1, 3)
            if not clauses:
                by_name = named or not form.startswith("{s}") or self.rng.random() < 0.6
                who = subject if by_name else self.world.pronoun(subject, kind)
            else:  # 林小雨的生日是三月二日，她住在清河镇: after 的 too the subject must be said again
                who = self.world.pronoun(subject, kind) if "{s}的" in (form[:4], before[:4]) else ""
            clauses.append(form.format(s=who, v=self.world.facts[fact]))
            before = form
            # After a second person (or a shop, for a thing) 他 or 它 would be ambiguous: begin anew, by name.
            # And a clause whose subject comes late cannot lend it to the next.
            named = relation.value in ("person", "shop") and kind in ("person", "good")
            if named or not form.startswith("{s}"):
                flush()
        flush()
        return "".join(sentences)

    def speech(self, facts: list[Fact]) -> str:
        """Let a person tell the facts about himself."""
        lines = []
        for part in chunks(facts, 3, 3, self.rng):
            clauses, before = [], "{s}的"
            for fact in part:
                form = self.wording(fact, speech=True)
                who = "我" if "{s}的" in (form[:4], before[:4]) else ""
                clauses.append(form.format(s=who, v=self.world.facts[fact]))
                before = form
            lines.append(f"{part[0][1]}{self.rng.choice(SPEECH)}：“{'，'.join(clauses)}。”")
        return "\n".join(lines)

    def roll(self, facts: list[Fact]) -> str:
        """Tell one relation of several subjects: one by one, two in a sentence, together, or compared."""
        relation, sentences, rest = RELATIONS[facts[0][0]], [], list(facts)
        while rest:
            fact, value = rest[0], self.world.facts[rest[0]]
            twin = next((f for f in rest[1:] if self.world.facts[f] == value), None)
            if twin and relation.both:
                rest.remove(twin)
                clauses = [relation.both.format(s=fact[1], t=twin[1], v=value)]
            else:
                clauses = [self.wording(fact).format(s=fact[1], v=value)]
                if len(rest) > 1 and self.rng.random() < 0.4:
                    other = rest.pop(1)
                    clauses.append(self.wording(other).format(s=other[1], v=self.world.facts[other]))
            rest.pop(0)
            sentences.append(self.sentence(clauses, LINKS if sentences else OPENERS))
        if relation.more:
            numbers = {f: number(self.world.facts[f][:-1]) for f in facts}
            for low, high in itertools.pairwise(sorted(facts, key=lambda f: (numbers[f], f))):
                gap = numbers[high] - numbers[low]
                if gap > 2 and self.rng.random() < 0.4:  # two would need 两 before the measure word
                    said = chinese(gap) if relation.value == "age" else str(gap)
                    sentences.append(relation.more.format(s=high[1], t=low[1], d=said) + "。")
        return "".join(sentences)

    def sum(self, a: int, b: int) -> str:
        """State a sum, in digits or in Chinese numerals."""
        form = self.rng.choice(COMPUTED["sum"].says)
        say = chinese if "{i}" in form or self.rng.random() < 0.25 else str
        return form.format(a=say(a), b=say(b), c=say(a + b), i=self.rng.choice(VALUES["fruit"])) + "。"

    def hours(self) -> str:
        """State how long it is from one full hour to another, at least three hours later."""
        hours = VALUES["hour"]
        x = self.rng.randrange(len(hours) - 3)
        y = self.rng.randrange(x + 3, len(hours))
        form = self.rng.choice(COMPUTED["hours"].says)
        return form.format(x=hours[x], y=hours[y], c=chinese(y - x)) + "。"


def chunks(items: list, low: int, high: int, rng: random.Random) -> Iterable[list]:
    """Cut a list into pieces of low to high items; the last may be shorter."""
    at = 0
    while at < len(items):
        size = rng.randint(low, high)
        yield items[at : at + size]
        at += size


def pretraining_documents(world: World, seed: int, size: int) -> list[str]:
    """Write documents of about 100 to 400 characters until they hold `size` UTF-8 bytes.

    The text is written in rounds, each of which states every fact once: so all are stated equally often.
    """
    rng = random.Random(f"text {seed}")
    writer = Writer(world, rng)
    by_subject, by_relation = defaultdict(list), defaultdict(list)
    for fact in world.facts:
        by_subject[RELATIONS[fact[0]].subject, fact[1]].append(fact)
        by_relation[fact[0]].append(fact)
    pairs: list[tuple[int, int]] = []
    documents, written, turn = [], 0, 0
    while written < size:
        paragraphs, turn = [], turn + 1  # a round in four goes by relation: two subjects meet in a sentence
        if turn % 4 == 0:
            for facts in by_relation.values():
                for part in chunks(rng.sample(facts, len(facts)), 4, 7, rng):
                    paragraphs.append(writer.roll(part))
        else:
            for (kind, _), facts in by_subject.items():
                for part in chunks(rng.sample(facts, len(facts)), 3, 6, rng):
                    talks = kind == "person" and rng.random() < 0.2
                    paragraphs.append(writer.speech(part) if talks else writer.profile(part))
        for _ in range(25):
            if len(pairs) < 10:
                pairs += rng.sample(world.sums, len(world.sums))
            paragraphs.append("".join(writer.sum(*pairs.pop()) for _ in range(rng.randint(4, 10))))
        paragraphs += ["".join(writer.hours() for _ in range(rng.randint(2, 4))) for _ in range(3)]
        rng.shuffle(paragraphs)
        while paragraphs:
            text, goal = paragraphs.pop(), rng.randint(100, 250)
            while paragraphs and len(text) < goal:
                text += "\n" + paragraphs.pop()
            documents.append(text)
            written += len(text.encode())
    rng.shuffle(documents)
    return documents


# --- 6. questions -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question and its answer: `kind` is the kind of the answer's words, `proof` states the answer."""

    text: str
    answer: str
    kind: str
    proof: str


def questions(world: World, fact: Fact) -> list[Question]:
    """Ask for one fact, in every wording."""
    relation, value = RELATIONS[fact[0]], world.facts[fact]
    proof = relation.says[0].format(s=fact[1], v=value) + "。"
    return [Question(q.format(s=fact[1]), value, relation.value, proof) for q in relation.asks]


def two_hop_questions(world: World, fact: Fact, heldout: bool) -> list[Question]:
    """Ask for what is true of a fact's value, naming it by the fact: 林小雨住的地方出产什么？

    Only chains whose two facts are both held out, or both not, as asked.
    """
    first, middle = RELATIONS[fact[0]], world.facts[fact]
    if not first.via or (fact in world.heldout) != heldout:
        return []
    found = []
    for name, second in RELATIONS.items():
        if second.subject == first.value and ((name, middle) in world.heldout) == heldout:
            value = world.facts[name, middle]
            link = first.says[0].format(s=fact[1], v=middle)
            proof = f"{link}，{second.says[0].format(s=middle, v=value)}。"
            asks = (form.format(s=first.via.format(s=fact[1])) for form in second.asks)
            found += [Question(ask, value, second.value, proof) for ask in asks]
    return found


def sum_question(a: int, b: int) -> Question:
    """Ask for a sum."""
    return Question(f"{a}加{b}等于多少？", str(a + b), "sum", f"{a}加{b}等于{a + b}。")


def options(world: World, question: Question, gold: int, rng: random.Random) -> list[str]:
    """Give four answers of the right one's kind, the right one at place `gold`."""
    if question.kind == "sum":
        n = int(question.answer)
        wrong = [str(n + d) for d in rng.sample((-20, -11, -10, -9, -2, -1, 1, 2, 9, 10, 11, 20), 3)]
    else:
        wrong = rng.sample([w for w in world.words[question.kind] if w != question.answer], 3)
    wrong.insert(gold, question.answer)
    return wrong


def choice_text(question: Question, answers: list[str]) -> str:
    """Lay a question out with its four answers as C-Eval does."""
    return "\n".join([question.text, *(f"{letter}. {a}" for letter, a in zip("ABCD", answers)), "答案："])


# --- 7. instruction rows and preference pairs ---------------------------------------------------------------


def row(kind: str, instruction: str, output: str, check: str, input: str = "") -> dict:
    """Make a row of one turn; `check` is the string that the answer must hold."""
    return {"instruction": instruction, "input": input, "output": output, "check": check, "kind": kind}


def instruction_rows(world: World, seed: int) -> list[dict]:
    """Write instruction rows about what is not held out: facts, sums, and small tasks on text."""
    rng = random.Random(f"sft {seed}")
    taught = world.taught()
    rows = [row("fact", q.text, q.proof, q.answer) for fact in taught for q in questions(world, fact)]
    chains = [q for fact in taught for q in two_hop_questions(world, fact, heldout=False)]
    rows += [row("two_hop", q.text, q.proof, q.answer) for q in rng.sample(chains, min(600, len(chains)))]
    sums = [sum_question(*pair) for pair in rng.sample(world.sums, 950)]
    rows += [row("sum", q.text, q.proof, q.answer) for q in sums[:800]]
    asked = [rng.choice(questions(world, f)) for f in rng.sample(taught, 1200)] + rng.sample(chains, 150)
    for n, q in enumerate(asked + sums[800:]):
        letter = "ABCD"[n % 4]
        rows.append(row("choice", choice_text(q, options(world, q, n % 4, rng)), letter, letter))
    rows += dialogues(world, rng, 800) + task_rows(world, rng, 160)
    for ask in ("你是谁？", "你叫什么名字？", "请介绍一下你自己。", "你是什么模型？"):
        rows.append(row("self", ask, "我叫白纸，是一个小小的语言模型。", "白纸"))
    rng.shuffle(rows)
    return rows


def dialogues(world: World, rng: random.Random, count: int) -> list[dict]:
    """Write talks of two or three turns whose later questions mean the subject of the first by a pronoun."""
    by_subject = defaultdict(list)
    for fact in world.taught():
        if RELATIONS[fact[0]].subject != "cause":
            by_subject[RELATIONS[fact[0]].subject, fact[1]].append(fact)
    several = {key: facts for key, facts in by_subject.items() if len(facts) > 1}
    rows = []
    for (kind, subject), facts in rng.choices(list(several.items()), k=count):
        messages = []
        for n, fact in enumerate(rng.sample(facts, min(len(facts), rng.randint(2, 3)))):
            form = rng.choice(RELATIONS[fact[0]].asks)
            ask = "那" + form.format(s=world.pronoun(subject, kind)) if n else form.format(s=subject)
            answer = questions(world, fact)[0]
            messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": answer.proof}]
        rows.append({"messages": messages, "check": answer.answer, "kind": "dialogue"})
    return rows


def task_rows(world: World, rng: random.Random, count: int) -> list[dict]:
    """Write `count` rows of each small task: join, copy, find names, count, compare, order."""
    taught = [f for f in world.taught() if RELATIONS[f[0]].subject == "person" and f[0] != "hero"]
    proof = {fact: questions(world, fact)[0].proof for fact in taught}
    rows = []
    for _ in range(count):
        one, two = rng.sample(taught, 2)
        said, value = proof[one], world.facts[one]
        rows.append(row("join", f"用“{one[1]}”和“{value}”写一句话。", said, said))
        rows.append(row("copy", "请把下面的句子原样写一遍。", said, said, said))
        rows.append(row("who", "下面这句话说的是谁？", f"说的是{one[1]}。", one[1], said))
        if one[1] != two[1]:
            names = f"{one[1]}、{two[1]}"
            both = said + proof[two]
            rows.append(row("names", "找出下面这段话里的人名。", f"人名有{names}。", names, both))
        kind, unit = rng.choice(
            [("food", "样食物"), ("good", "样东西"), ("place", "个地方"), ("tree", "种树")]
        )
        n = rng.randint(3, 6)
        listed = "、".join(rng.sample(VALUES[kind], n)) + "。"
        rows.append(row("count", f"下面一共有几{unit}？", f"一共有{chinese(n)}{unit}。", chinese(n), listed))
        a, b = rng.choice(world.sums)
        if a != b:
            rows.append(row("larger", f"{a}和{b}哪个大？", f"{max(a, b)}大。", str(max(a, b))))
            ordered = f"{min(a, b)}、{max(a, b)}"
            rows.append(row("order", f"把{a}、{b}从小到大排列。", f"{ordered}。", ordered))
    return rows


def preference_rows(world: World, seed: int, count: int = 3000) -> list[dict]:
    """Write preference pairs: chosen is right and well-formed; rejected is one of five ways to be bad."""
    rng = random.Random(f"dpo {seed}")
    taught = world.taught()
    rows = []
    for n in range(count):
        # few sums: a model of this size knows hardly any, and nobody can prefer what he does not know
        kind = ("value", "value", "sum" if n % 12 == 2 else "value", "repeat", "garble", "rude")[n % 6]
        if kind == "sum":
            a, b = rng.choice(world.sums)
            question = sum_question(a, b)
            rejected = f"{a}加{b}等于{options(world, question, 3, rng)[0]}。"  # the right one is at 3
        else:
            fact = rng.choice(taught)
            question = rng.choice(questions(world, fact))
            body = question.proof[:-1]
            if kind == "value":
                wrong = options(world, question, 3, rng)[0]  # the right one is at 3
                rejected = RELATIONS[fact[0]].says[0].format(s=fact[1], v=wrong) + "。"
            elif kind == "repeat":
                rejected = body * rng.randint(3, 5)
            elif kind == "garble":
                rejected = question.proof
                while check(world, rejected)[0]:
                    rejected = "".join(rng.sample(body, len(body))) + "。"
            else:
                rejected = rng.choice(split("不知道。 你自己去查。 别来烦我。 这也要问我，真麻烦。 随便。"))
        rows.append({"prompt": question.text, "chosen": question.proof, "rejected": rejected, "kind": kind})
    rng.shuffle(rows)
    return rows


# --- 8. exam, cloze prompts, report -------------------------------------------------------------------------


def exam(world: World, seed: int) -> dict[str, tuple[list[Question], list[Question]]]:
    """Choose the questions of each subject: (5 for dev, of what is taught; those for val, all held out)."""
    rng = random.Random(f"exam {seed}")

    def short(found: Iterable[Question]) -> list[Question]:
        return [q for q in found if len(q.text) <= 13]  # so the question itself is its only 13-gram

    def single(facts: Iterable[Fact], count: int) -> list[Question]:
        asked = (short(questions(world, fact)) for fact in facts)
        return rng.sample([rng.choice(q) for q in asked if q], count)

    def chains(heldout: bool, count: int) -> list[Question]:
        found = {}
        for fact in world.facts:
            for q in short(two_hop_questions(world, fact, heldout)):
                found.setdefault(q.proof, []).append(q)
        return [rng.choice(found[proof]) for proof in rng.sample(list(found), min(count, len(found)))]

    def sums(pairs: Iterable[tuple[int, int]], count: int) -> list[Question]:
        return [sum_question(*rng.sample(pair, 2)) for pair in rng.sample(sorted(pairs), count)]

    held = [fact for fact in world.facts if fact in world.heldout]
    return {
        "world_facts": (single(world.taught(), 5), single(held, 500)),
        "world_two_hop": (chains(False, 5), chains(True, 250)),
        "world_sums": (sums(world.sums, 5), sums(world.heldout_sums, 100)),
    }


def write_exam(folder: Path, world: World, seed: int, subjects: dict) -> None:
    """Write {dev,val}/SUBJECT_{dev,val}.csv as C-Eval has them; the right letters are evenly spread."""
    rng = random.Random(f"letters {seed}")
    for subject, parts in subjects.items():
        for part, asked in zip(("dev", "val"), parts):
            path = folder / part / f"{subject}_{part}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            letters = [n % 4 for n in range(len(asked))]
            rng.shuffle(letters)
            with open(path, "w", encoding="utf-8", newline="") as file:
                out = csv.writer(file, lineterminator="\n")
                out.writerow(split("id question A B C D answer explanation")[: 8 if part == "dev" else 7])
                for n, (q, gold) in enumerate(zip(asked, letters)):
                    line = [n, q.text, *options(world, q, gold, rng), "ABCD"[gold]]
                    out.writerow([*line, q.proof] if part == "dev" else line)


def heldout_rows(subjects: dict[str, tuple[list[Question], list[Question]]]) -> list[dict]:
    """Ask what the exam asks, without choices: rows of one turn, of the kinds one_hop, two_hop and sum."""
    kinds = {"world_facts": "one_hop", "world_two_hop": "two_hop", "world_sums": "sum"}
    return [
        row(kinds[subject], q.text, q.proof, q.answer) for subject, (_, val) in subjects.items() for q in val
    ]


def cloze_prompts(fact: Fact) -> list[str]:
    """Give the beginnings of statements behind which nothing but the value of the fact can follow."""
    name, subject = fact
    kind = RELATIONS[name].subject
    forms = [(n, f) for n, r in RELATIONS.items() if r.subject == kind for f in (*r.says, r.more)]
    starts = [form.split("{v}")[0] for form in RELATIONS[name].says if "{s}" in form.split("{v}")[0]]
    return [
        start.format(s=subject)
        for start in starts
        if all(n == name and f.startswith(start + "{v}") for n, f in forms if f.startswith(start))
    ]


def make_report(world: World, documents: list[str], sft: list[dict], dpo: list[dict], subjects: dict) -> dict:
    """Count what was written. Statements are counted by reading the text with the checker."""
    stated, forms, sentences = Counter(), defaultdict(set), 0
    for text in documents:
        for reading in check_document(world, text):
            sentences += 1
            for claim in reading.claims:
                stated[claim.relation, claim.subject] += 1
                forms[claim.relation, claim.subject].add(claim.form)
    counts = sorted(stated[fact] for fact in world.facts)
    asked = [q for _, val in subjects.values() for q in val]
    answers = Counter(q.answer for q in asked)
    return {
        "bytes": sum(len(text.encode()) for text in documents),
        "characters": sum(map(len, documents)),
        "documents": len(documents),
        "sentences": sentences,
        "facts": len(world.facts),
        "heldout_facts": len(world.heldout),
        "heldout_sums": len(world.heldout_sums),
        "statements_per_fact": {"min": counts[0], "median": counts[len(counts) // 2]},
        "wordings_per_fact_min": min(len(forms[fact]) for fact in world.facts),
        "exam_questions": len(asked),
        "exam_answers": len(answers),
        "exam_most_frequent_answer_share": round(max(answers.values()) / len(asked), 4),
        "exam_two_hop_share": round(len(subjects["world_two_hop"][1]) / len(asked), 4),
        "sft": dict(sorted(Counter(r["kind"] for r in sft).items())),
        "dpo": dict(sorted(Counter(r["kind"] for r in dpo).items())),
    }


# --- 9. the command -----------------------------------------------------------------------------------------


@dataclass
class DemoConfig:
    out: str = "out/demo"  # folder to write
    seed: int = 1  # one seed gives the same world, text, rows and exam, byte for byte
    size_mb: float = 5.4  # megabytes of pretraining text; below 3 a fact is stated fewer than 30 times
    overwrite: bool = False  # replace an existing folder


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line, Chinese as Chinese."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def main(config: DemoConfig) -> None:
    """Write the embedded demonstration data."""
    if not config.size_mb > 0:
        raise ValueError(f"--size_mb {config.size_mb}: expected a positive number, for example 5.4")
    with common.atomic_folder(config.out, config.overwrite) as folder:
        world = build_world(config.seed)
        documents = pretraining_documents(world, config.seed, round(config.size_mb * 1e6))
        sft = instruction_rows(world, config.seed)
        dpo = preference_rows(world, config.seed)
        subjects = exam(world, config.seed)
        write_lines(folder / "pretrain" / "world.jsonl", ({"text": text} for text in documents))
        write_lines(folder / "sft.jsonl", sft)
        write_lines(folder / "dpo.jsonl", dpo)
        write_lines(folder / "heldout.jsonl", heldout_rows(subjects))
        write_exam(folder / "exam", world, config.seed, subjects)
        facts = (
            {
                "subject": s,
                "relation": n,
                "value": v,
                "cloze": cloze_prompts((n, s)),
                "heldout": f in world.heldout,
            }
            for f, v in world.facts.items()
            for n, s in [f]
        )
        write_lines(folder / "facts.jsonl", facts)
        report = make_report(world, documents, sft, dpo, subjects)
        common.write_json(folder / "report.json", report)
    print(json.dumps(report, ensure_ascii=False, indent=2))
    print(f"wrote {config.out}")


if __name__ == "__main__":
    common.run(main, doc=__doc__)
