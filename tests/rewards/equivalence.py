r"""Labels with answers that equal them and answers that do not, by kind, written by hand from what the notation means.

An answer is the content of the last box; a Response is all of a response, which has no box or several.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Label(NamedTuple):
    value: Any
    right: list[str]
    wrong: list[str]


class Response(str):
    """A whole response."""


CASES: dict[str, list[Label]] = {
    "thousands": [
        Label("1234567", ["1,234,567", "1{,}234{,}567", r"1\,234\,567", "1 234 567", r"1,\!234,\!567"], ["1,234,568"]),
        Label("1,000", ["1000", "1000.0", "10^3", "1e3"], ["1", "1.000", "100", "10,000"]),
        Label(12345, ["12,345", "12345.00", r"12\;345"], ["12.345", "1,2345", "12,346"]),
        Label("(1, 234)", ["(1,234)", "(1, 234)"], ["(234, 1)"]),
    ],
    "scientific": [
        Label(
            "1e-05",
            ["0.00001", r"10^{-5}", r"1 \times 10^{-5}", "1e-5", r"\frac{1}{100000}"],
            ["e-5", "0.0001", "2e-5"],
        ),
        Label("1e-5", ["1e-05", "1.0e-5", "10**-5"], ["e-5", "1e5", "-5", "1e-6", "0"]),
        Label(1e-05, ["1e-05", "0.00001", r"10^{-5}"], ["1e-04", "0"]),
        Label(
            "1.5e9",
            ["1500000000", "1,500,000,000", r"1.5 \times 10^9", r"1.5\cdot10^{9}", "1.5E+09", "15e8"],
            ["1.5e8", "1.5", "1.5e-9"],
        ),
        Label("6.02e23", [r"6.02 \times 10^{23}", "602e21", "6.02 × 10²³", "6.02*10**23"], ["6.02e22", "6.03e23"]),
        Label(r"3 \times 10^{8}", ["3e8", "300000000", "300,000,000"], ["3e9", "3 * 8", "30^8"]),
        Label("-2.5e-3", ["-0.0025", r"-\frac{1}{400}", "-2.5E-3"], ["0.0025", "-0.025"]),
        Label("1e-7", ["0.0000001", r"10^{-7}"], ["2e-7", "0", "1e-8"]),
        Label(1e16, ["10000000000000000", "10^{16}", "1e16"], ["1e15", "e16"]),
    ],
    "python": [
        Label(
            "pi/3",
            [r"\frac{\pi}{3}", "π/3", r"\pi/3", r"\frac13\pi", r"\dfrac{\pi}{3}"],
            [r"\frac{\pi}{6}", "1/3", "3", r"\frac{3}{\pi}"],
        ),
        Label("2**10", ["1024", "2^{10}", "2^10", "1,024", "4**5"], ["20", "2*10", "210", "1023", "2^{1}0"]),
        Label("x**2", ["x^2", "x^{2}", "x*x", r"x \cdot x"], ["2x", "x", "x^3", "y^2"]),
        Label("3*x + 2", ["3x+2", "2 + 3x", r"3 \cdot x + 2"], ["3x-2", "5x", "2x+3"]),
        Label(
            "sqrt(2)/2",
            [r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", "2**-0.5", r"\frac{\sqrt2}{2}"],
            [r"\sqrt{2}", r"\frac{\sqrt{3}}{2}"],
        ),
        Label("2*pi*r", [r"2\pi r", r"2 \pi r", "pi*2*r"], [r"\pi r^2", r"\pi r"]),
        Label("(x + 1)**2", ["x^2+2x+1", "(x+1)^2", "(1+x)**2"], ["x^2+1", "(x-1)^2"]),
        Label("-x**2 + 4", ["4-x^2", "(2-x)(2+x)"], ["x^2+4", "(-x)^2+4"]),
        Label("1/2 + 1/3", [r"\frac{5}{6}", "5/6"], [r"\frac{2}{5}", "1/6"]),
        Label("exp(2)", ["e^2", "e^{2}"], ["2e", "e", r"2^e"]),
        Label("log(8)/log(2)", ["3"], ["4", "8/2"]),
        Label("2**0.5", [r"\sqrt{2}", r"2^{1/2}"], ["2", "1", r"\sqrt{3}"]),
    ],
    "fractions": [
        Label(
            "1/2",
            [r"\frac{1}{2}", r"\frac12", r"\dfrac{1}{2}", r"\tfrac{2}{4}", "0.5", ".5", "½", "0.50"],
            ["2", r"\frac{2}{1}", "0.2", "1/3", "12", "1.2"],
        ),
        Label(
            r"\frac{-3}{4}",
            [r"-\frac{3}{4}", "-3/4", "-0.75", r"\frac{3}{-4}"],
            [r"\frac{3}{4}", r"-\frac{4}{3}", "0.75"],
        ),
        Label("1/3", [r"\frac{1}{3}", r"\frac{2}{6}", "0.333333333"], ["0.33", "0.3", "0.34", "3", "13"]),
        Label("0.25", [r"\frac14", "1/4", "25/100", r"\frac{1}{4}"], ["0.26", "4", "1/5"]),
        Label("7/3", [r"\frac{7}{3}", r"2\frac{1}{3}", "2 1/3"], ["2.3", r"\frac{3}{7}", "2"]),
        Label(0.1, ["0.1", r"\frac{1}{10}", "1/10"], ["0.01", "1", "0.11"]),
        Label("22/7", [r"\frac{22}{7}"], [r"\pi", "3.14", "3"]),
    ],
    "mixed numbers": [
        Label(
            "1 1/2",
            ["1.5", r"\frac{3}{2}", r"1\frac{1}{2}", "3/2", "1½", r"1 \frac12"],
            ["11/2", "1/2", "1", r"\frac{11}{2}"],
        ),
        Label(r"2\frac{3}{4}", ["2.75", "11/4", "2 3/4", r"\frac{11}{4}"], ["23/4", "1.5", r"\frac{6}{4}"]),
        Label("-3 1/4", ["-3.25", r"-\frac{13}{4}", r"-3\frac{1}{4}"], ["-2.75", "3.25", "-31/4"]),
    ],
    "percent": [
        Label("50%", [r"50\%", "50 %", "0.5", r"\frac{1}{2}", "50 percent"], ["5%", "0.05", "0.50%", "5", r"500\%"]),
        Label("0.5", [r"50\%", "50%"], ["0.5%", "5%"]),
        Label("12.5%", [r"12.5\%", "0.125", "1/8"], ["1.25%", "125%", "0.0125"]),
        Label("100%", ["1", r"100\%"], ["10%", "0.1"]),
    ],
    "units": [
        Label(
            "12 cm",
            ["12", r"12\text{ cm}", r"12 \mathrm{cm}", "12cm", r"12\,\text{cm}", "12 centimeters"],
            ["12 m", "13 cm", "1.2 cm", r"12 \text{ km}"],
        ),
        Label(
            "12",
            ["12 cm", r"12\text{ apples}", r"12 \text{ dollars}", r"\$12", "12 dollars"],
            ["13 cm", r"\$1.2", "120"],
        ),
        Label("$18", ["18", r"\$18", "18 dollars", "$18.00", r"18\text{ dollars}"], ["$1.8", r"\$81", "180"]),
        Label("5 m/s", ["5", r"5\text{ m/s}", r"5 \mathrm{m/s}"], ["6 m/s", r"50\text{ m/s}"]),
        Label(
            "24 cm^2",
            ["24", r"24\text{ cm}^2", r"24 \text{ square centimeters}", r"24 \text{ cm}^{2}"],
            ["24 m^2", "42", r"24\text{ cm}^3"],
        ),
        Label("3 hours", ["3", r"3\text{ hours}", "3 h", r"3 \text{ hr}"], ["3 minutes", "180", r"3 \text{ days}"]),
        Label("2.5 kg", [r"2.5\text{ kg}", "2.5", "2.5 kilograms"], ["2.5 g", "25 kg", "2.5 mg"]),
    ],
    "degrees": [
        Label(
            "90",
            [r"90^\circ", r"90^{\circ}", "90°", r"90 \text{ degrees}", "90 degrees"],
            [r"9^\circ", r"900^\circ", r"45^\circ"],
        ),
        Label(r"45^\circ", ["45", "45°", r"45^{\circ}", "45 degrees"], ["54", r"45.5^\circ", r"-45^\circ"]),
    ],
    "signs": [
        Label("-5", ["−5", "–5", "- 5", "-5.0", "－5"], ["5", "+5", "-50"]),
        Label("−7", ["-7", "−7.0"], ["7"]),
        Label("-1/2", ["−1/2", r"-\frac{1}{2}", r"\frac{-1}{2}", "−0.5"], ["1/2", "-2"]),
        Label("+3", ["3", "3.0", "+3"], ["-3", "33"]),
        Label("x − 1", ["x-1", "-1+x"], ["x+1", "1-x"]),
    ],
    "trailing zeros": [
        Label("2.5", ["2.50", "2.500", r"\frac{5}{2}", "2.5000"], ["2.05", "25", "2.51"]),
        Label("19", ["19.0", "19.000", "019", "19."], ["19.01", "1.9", "190"]),
        Label(3.0, ["3", "3.00"], ["30", "0.3"]),
        Label("0.10", ["0.1", ".1", "1/10"], ["0.01", "0.010", "10"]),
        Label("100.00", ["100", "1e2"], ["1", "10000"]),
    ],
    "decimals": [
        Label("3.14", ["3.14", "3.140", "157/50"], [r"\pi", "3.1416", "3.1", "22/7"]),
        Label("0.001", ["1e-3", "0.0010", r"\frac{1}{1000}"], ["0.01", "0.0001", "0.002"]),
        Label("2.0000001", ["2.0000001"], ["2"]),
        Label("0.30000000000000004", ["0.3", r"\frac{3}{10}"], ["0.31", "0.4"]),
        Label("123456789", ["123,456,789"], ["123456788", "123456790"]),
        Label("0.3333333333333333", [r"\frac{1}{3}", "1/3"], ["0.33", "1/2", "1/30"]),
    ],
    "intervals": [
        Label("(0, 1]", ["(0,1]", r"\left(0, 1\right]", r"(0, 1.0]"], ["[0,1]", "(0,1)", "(0,2]", "[0,1)"]),
        Label(
            r"[2, \infty)",
            [r"[2,\infty)", r"\left[2, \infty\right)", "[2, ∞)"],
            [r"(2,\infty)", r"(-\infty, 2]", r"[3,\infty)"],
        ),
        Label(
            r"(-\infty, -1) \cup (1, \infty)",
            [r"(1,\infty)\cup(-\infty,-1)", r"(-\infty,-1)\cup(1,\infty)"],
            [r"(-1,1)", r"(-\infty,-1]\cup[1,\infty)"],
        ),
        Label(r"\left[-\frac{1}{2}, \frac{1}{2}\right]", ["[-1/2, 1/2]", "[-0.5, 0.5]"], ["(-1/2, 1/2)", "[0, 1/2]"]),
    ],
    "sets": [
        Label(
            r"\{1, 2, 3\}",
            [r"\{3,2,1\}", r"\{1,2,3\}", r"\left\{1, 2, 3\right\}"],
            [r"\{1,2\}", r"\{1,2,4\}", r"\{1,2,3,4\}"],
        ),
        Label(r"\{-1, 1\}", [r"\{1,-1\}", "-1, 1", "1, -1"], [r"\{1\}", r"\{-1,2\}"]),
        Label(r"\{\frac{1}{2}, 3\}", [r"\{3, 0.5\}", r"\{1/2, 3\}"], [r"\{2, 3\}"]),
        Label(r"\emptyset", [r"\emptyset"], [r"\{0\}", "0"]),
    ],
    "tuples": [
        Label("(1, 2)", ["(1,2)", r"\left(1, 2\right)", "(1.0, 2.0)"], ["(2,1)", "(1,3)", "(1,2,3)", "3"]),
        Label("(-3, 4)", ["(−3, 4)", "(-3,4)"], ["(3,4)", "(4,-3)", "(-3,-4)"]),
        Label("(1, 2, 3)", ["(1,2,3)", r"\left(1,2,3\right)"], ["(3,2,1)", "(1,2)", "(1,2,4)"]),
        Label("(1/2, 2**3)", [r"\left(\frac{1}{2}, 8\right)", "(0.5, 8)"], ["(1/2, 6)", "(8, 1/2)", "(2, 8)"]),
        Label(
            r"\left(3, \frac{\pi}{2}\right)", ["(3, pi/2)", r"(3,\frac{\pi}{2})"], [r"(3,\pi)", r"(\frac{\pi}{2}, 3)"]
        ),
    ],
    "matrices": [
        Label(
            r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
            [
                r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}",
                r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
                r"\begin{pmatrix}1.0&2\\3&4\end{pmatrix}",
            ],
            [r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}", "1"],
        ),
        Label(
            r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}",
            [r"\begin{bmatrix} 1 \\ -2 \end{bmatrix}", r"\begin{pmatrix}1\\-2\end{pmatrix}"],
            [r"\begin{pmatrix} -2 \\ 1 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"],
        ),
    ],
    "words": [
        Label("blue", [r"\text{blue}", "Blue", r"\textbf{blue}", "blue."], ["red", r"\text{green}", "5"]),
        Label(r"\text{Monday}", ["Monday", r"\text{monday}", r"\mathrm{Monday}"], [r"\text{Tuesday}", "Sunday"]),
        Label("listen", [r"\text{listen}"], [r"\text{silent}", "silent", "enlist"]),
        Label(
            "A", [r"\text{A}", r"\text{(A)}", r"\textbf{(A)}", "(A)", r"\mathrm{A}"], ["B", r"\text{(B)}", r"\text{AB}"]
        ),
        Label(r"\text{(C)}", ["C", r"\textbf{(C)}", "(C)"], ["D", r"\text{(D)}"]),
        Label("odd", [r"\text{odd}"], [r"\text{even}"]),
        Label("Evelyn", [r"\text{Evelyn}", "evelyn"], [r"\text{Evan}"]),
    ],
    "algebra": [
        Label("x = 3", ["3", "x=3", "x = 3.0"], ["x=4", "4", "-3"]),
        Label("3", ["x = 3", "y=3"], ["x=4", "x = 33"]),
        Label("y = 2x + 1", ["y=2x+1", "y = 1 + 2x"], ["y=2x-1", "y = x + 2"]),
        Label("2x", [r"2 \cdot x", "x+x", "2*x"], ["x^2", "2", "2y"]),
        Label(r"\sqrt{8}", [r"2\sqrt{2}", "2*sqrt(2)", "8^{1/2}"], [r"\sqrt{2}", "4", "2.8"]),
        Label(r"x^2 - 1", ["(x-1)(x+1)", "-1+x^2"], ["(x-1)^2", "x^2+1"]),
        Label(r"\frac{x}{2}", ["x/2", r"\frac{1}{2}x", "0.5x"], ["2x", r"\frac{2}{x}"]),
        Label("3 + 4i", ["3+4i", "4i+3"], ["3-4i", "4+3i", "7"]),
        Label("x > 2", ["x>2", "2 < x"], ["x<2", r"x \geq 2", "x>3"]),
    ],
    "nested braces": [
        Label(
            r"\frac{\sqrt{3}}{2}",
            [r"\frac{\sqrt{3}}{2}", r"\dfrac{\sqrt{3}}{2}", "sqrt(3)/2"],
            [r"\frac{\sqrt{2}}{2}", r"\frac{3}{2}"],
        ),
        Label(r"2^{\frac{1}{2}}", [r"\sqrt{2}", "2**(1/2)"], ["1", r"2^{2}"]),
        Label(r"\boxed{\frac{1}{2}}", ["1/2", r"{\frac{1}{2}}"], ["2"]),
    ],
    "responses": [
        Label(
            "7",
            [
                Response(r"First \boxed{3}, then \boxed{7}."),
                Response(r"\boxed{\boxed{7}}"),
                Response("The answer is 7."),
                Response("so x = 7"),
                Response("$7$"),
                Response("#### 7"),
                Response("**7**"),
            ],
            [
                Response(r"\boxed{7} or rather \boxed{3}"),
                Response("7 or 8"),
                Response("no idea"),
                Response(r"\boxed{}"),
                Response(""),
            ],
        ),
        Label(
            "1e-05",
            [Response("It is 1e-5."), Response("The result is 0.00001"), Response("= 1e-05")],
            [Response("It is e-5."), Response("It is 1e-4.")],
        ),
        Label(
            "2**10",
            [Response("The answer is 1024."), Response("So we get 2**10"), Response("1,024")],
            [Response("The answer is 2*10."), Response("2048")],
        ),
        Label(
            "pi/3",
            [Response(r"The angle is $\frac{\pi}{3}$."), Response("The angle is pi/3.")],
            [Response("The angle is pi/6."), Response("It is 3.")],
        ),
        Label(
            "18",
            [Response("She earns $18."), Response("9 * 2 = 18"), Response("She earns $18 every day.")],
            [Response("She earns $81."), Response("9 * 2 = 16")],
        ),
    ],
    "more of each kind": [
        Label("0.\\overline{3}", ["1/3"], ["0.3"]),
        Label("5!", ["120"], ["5", "24"]),
        Label(r"\binom{5}{2}", ["10"], ["5/2", "20"]),
        Label(r"\sqrt[3]{8}", ["2", "8**(1/3)", "cbrt(8)"], ["8", "3"]),
        Label(r"33\frac{1}{3}\%", ["1/3", r"33\frac13\%", "33 1/3 %"], ["33%", "0.3"]),
        Label("x = \\pm 2", [r"x=\pm 2", r"\pm 2"], ["2", "3"]),
        Label("2, -2", ["-2, 2", r"\{2,-2\}", r"x=2,-2"], ["2", "2,2"]),
        Label("1:2", ["1:2"], ["2:1"]),
        Label("-\\infty", [r"-\infty", "-∞"], [r"\infty", "0"]),
        Label("1e-300", ["1e-300"], ["1e-301", "0"]),
        Label("1e400", ["1e400", "10^{400}"], ["1e401"]),
        Label(12, ["12", "12.0", r"12\%"], ["-12", "1 2"]),
        Label(-0.0, ["0", "-0"], ["1"]),
        Label("0", ["0.0", "0.00", "-0"], ["1e-7", "0.0000001", "1e-30"]),
        Label("e", ["e", "e^1", "exp(1)"], ["2.7", "1"]),
        Label("e**2 - 1", ["e^2-1", "-1+e^{2}"], ["e^2", "e"]),
        Label("2e", ["2e", r"2 \cdot e"], ["2", "e^2"]),
        Label("3e2", ["300"], ["3e^2", "3e", "9"]),
        Label("1E-3", ["0.001", "1e-3"], ["E-3", "1"]),
        Label("5%", ["0.05", r"\frac{1}{20}", "5"], ["0.5", "50%"]),
        Label(r"\frac{1}{2}x + 3", ["x/2+3", "0.5*x + 3", "(x+6)/2"], ["x/2-3", "(x+3)/2"]),
        Label("a**2 + b**2", ["b^2+a^2", "a^{2}+b^{2}"], ["(a+b)^2", "a+b"]),
        Label("n*(n+1)/2", [r"\frac{n(n+1)}{2}", "n^2/2+n/2"], ["n(n-1)/2", "n^2/2"]),
        Label("2**-3", ["1/8", "0.125", "2^{-3}"], ["-8", "8", "-6"]),
        Label("10**6", ["1000000", "1,000,000", "1e6"], ["60", "100000"]),
        Label("7 // 2", [], ["3.5"]),
        Label("17 % 5", [], ["0.17"]),
        Label("(2, 3)", ["(2,3)"], ["[2,3]", "23"]),
        Label("[1, 2, 3]", ["[1,2,3]"], ["[3,2,1]"]),
        Label("{1, 2}", [r"\{1,2\}", r"\{2,1\}"], [r"\{1,3\}"]),
        Label("True", [r"\text{True}", "true"], ["False", r"\text{False}"]),
        Label("yes", [r"\text{yes}", r"\text{Yes}"], ["no", r"\text{no}"]),
        Label("No", [r"\text{no}"], ["yes", r"\text{on}"]),
        Label("Paris, London", ["London, Paris", r"\text{Paris and London}"], ["Paris", "Paris, Rome"]),
        Label("3.5 hours", [r"3.5\text{ hours}", r"3\frac{1}{2}\text{ hours}", "3.5"], ["3.5 minutes", "35 hours"]),
        Label("£20", ["20", r"£20.00"], ["$20", "£2"]),
        Label("1000 m", ["1000", "1,000 m", "1000 meters"], ["1000 km", "100 m"]),
        Label("$1,234.50", ["1234.5", r"\$1,234.50", r"\$1{,}234.50"], ["1234", r"\$123.45"]),
        Label("1 000 000", ["1000000", r"1\,000\,000", "10^6"], ["1", "1000"]),
        Label("- 3/4", ["-3/4", "-0.75"], ["3/4"]),
        Label(
            "0.5 cm", [r"\frac{1}{2}\text{ cm}", r"\frac12 \mathrm{~cm}", ".5 cm"], [r"\frac{1}{2}\text{ m}", "5 cm"]
        ),
        Label(r"60^\circ", [r"60", r"60°", r"60 \degree"], [r"\frac{\pi}{3}", "30"]),
        Label(r"\frac{\pi}{3}", ["pi/3", r"\frac{1}{3}\pi", "1.047198"], ["1.05", "1.047", r"60"]),
        Label("3.14159265", [r"\pi"], ["3.14", "22/7"]),
        Label(r"\frac{3}{5}", ["3/5", "0.6", "60\\%", r"\frac{6}{10}"], ["5/3", "0.35", "6%"]),
        Label(r"\text{7 apples}", ["7", r"7\text{ apples}", "7 apples"], ["8 apples"]),
        Label(r"7\,\text{m}^2", ["7", r"7\text{ m}^2", "7 m^2"], [r"7\text{ m}", r"7\text{ cm}^2"]),
        Label(r"\left\{\frac{1}{2}, -3\right\}", [r"\{-3, 1/2\}", r"\{-3, 0.5\}"], [r"\{3, 1/2\}"]),
        Label(
            r"\begin{bmatrix} \frac{1}{2} & 0 \\ 0 & -1 \end{bmatrix}",
            [r"\begin{pmatrix} 0.5 & 0 \\ 0 & -1 \end{pmatrix}", r"\begin{pmatrix} 1/2 & 0 \\ 0 & -1 \end{pmatrix}"],
            [r"\begin{pmatrix} 1/2 & 0 \\ 0 & 1 \end{pmatrix}"],
        ),
        Label("5", [r"\text{five} = 5", r"{5}", r"\,5\,", r"(5)", r"\mathbf{5}", r"5\text{.}"], ["five6", "{6}"]),
        Label("(5)", ["5"], ["6"]),
        Label("x^2+1", ["1+x**2"], ["x**2-1"]),
        Label("f(x) = x**2", ["x^2", "f(x)=x^2"], ["x^3"]),
        Label("sin(x)**2 + cos(x)**2", ["1"], ["2", "0"]),
        Label("100 °C", ["100"], ["10"]),
        Label("0.1 + 0.2", ["0.3"], ["0.30001"]),
        Label("2/4", ["1/2", "0.5"], ["2", "4/2"]),
        Label("12 1/2 %", ["12.5%", "0.125"], ["12%"]),
        Label("1.0 x 10^-3", ["0.001", "1e-3"], ["1e3"]),
        Label("4.00 × 10^2", ["400", "4e2"], ["4", "40"]),
        Label("(x, y) = (1, 2)", ["(1,2)"], ["(2,1)"]),
        Label("x < 3", ["x<3", "3 > x", r"(-\infty, 3)"], ["x>3", "x \\le 3"]),
        Label("1 < x < 2", ["1<x<2", "(1,2)"], ["[1,2]"]),
    ],
}
