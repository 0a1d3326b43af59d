"""The style of what this report adds to the common page."""

STYLE = """<style>
main{max-width:72rem}
.flow{margin-top:1rem}.flow input{position:absolute;opacity:0}
.flow label{display:inline-block;font-size:.88rem;color:var(--soft);border:1px solid var(--rule);
border-radius:6px;padding:.15rem .8rem;margin-right:.4rem;cursor:pointer}
.flow input:checked+label{color:var(--ink);background:var(--card);border-color:var(--soft)}
.flow input:focus-visible+label{outline:2px solid var(--link)}
#flow0:checked~.flow1,#flow1:checked~.flow0{display:none}
.flow svg{display:block;width:100%;min-width:56rem;margin-top:.6rem;font-size:12.5px}
.flow text{fill:var(--ink)}.flow .end{text-anchor:end;fill:var(--soft);font-size:11.5px}
.flow .name{fill:var(--ink);font-weight:600;font-size:13px}
.flow .soft,.flow .note{fill:var(--soft)}.flow .note{font-style:italic}
.flow .node{fill:var(--ink);opacity:.75}.flow .last{fill:rgb(var(--low));opacity:1}
.flow .stripe{opacity:.6}.flow .drop{fill:var(--bad);opacity:.42}
.flow .taken{fill:var(--soft);opacity:.32}.flow path:hover{opacity:.85}
.sources{display:flex;flex-wrap:wrap;gap:.3rem 1.6rem;margin:1rem 0 0;font-size:.9rem}
.sources i{display:inline-block;width:.75rem;height:.75rem;border-radius:2px;opacity:.75;
margin-right:.45rem}
.sources small,.example small{color:var(--soft)}
td.n,th.n{text-align:right;padding-right:0;padding-left:1.1rem;white-space:nowrap}
tbody tr:hover td{background:var(--card)}tfoot td{font-weight:600}
.meter{display:inline-block;width:4.5rem;height:.5rem;border-radius:2px;background:var(--rule);
margin-left:.6rem;vertical-align:.05rem;overflow:hidden}
.meter i{display:block;height:100%;background:var(--bad);opacity:.7}
.kept .meter i{background:rgb(var(--low))}
.step{border-top:1px solid var(--rule);margin:0;padding:.7rem 0}
.step>summary{color:var(--ink);font-weight:600}
.step>summary small{color:var(--soft);font-weight:400;margin-left:.6rem}
.step>summary small{overflow-wrap:anywhere}
.step[open]{padding-bottom:1.6rem}
h4{font-size:.92rem;font-weight:600;margin:1.4rem 0 0}h4 small{font-weight:400;color:var(--soft)}
.example{margin:.7rem 0 0;border:1px solid var(--rule);border-radius:8px;overflow:hidden}
.example header{display:block;padding:.45rem .9rem;font-size:.84rem;background:var(--card);
overflow-wrap:anywhere}
.example b{font-weight:600}.example .why{color:var(--bad)}
.example pre{border:0;border-radius:0;margin:0;background:none;max-height:15rem;overflow:auto}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(24rem,1fr));gap:0 3rem}
@media print{.step:not([open])>*{display:block}}
</style>"""
