//! The verifier reports every error of a program, and where it is.

use lathe_ir::ops::{Get, Input};
use lathe_ir::text::parse;
use lathe_ir::*;

fn errors(g: &Graph) -> Vec<String> {
    verify(g).iter().map(ToString::to_string).collect()
}

fn parsed(body: &str) -> Graph {
    parse(&format!("graph \"g\" {{\n{body}}}\n")).expect("parses")
}

fn node(op: Op, inputs: &[u32], ty: Type) -> Node {
    Node {
        op,
        inputs: inputs.iter().map(|&i| NodeId(i)).collect(),
        ty,
        prov: Prov::layer(2, "mlp"),
    }
}

#[test]
fn operands_types_and_outputs() {
    let mut g = Graph::new("g");
    let x = Op::Input(Input {
        name: "x".into(),
        dtype: DType::F32,
        shape: vec![Dim::new(2)],
    });
    let two = || Type::tensor(DType::F32, [Dim::new(2)]);
    g.push_unchecked(node(x, &[], two()));
    let neg = || Op::Unary(UnaryFn::Neg);
    g.push_unchecked(node(neg(), &[1], two()));
    g.push_unchecked(node(neg(), &[0], Type::tensor(DType::F32, [Dim::new(3)])));
    g.push_unchecked(node(neg(), &[0, 9], two()));
    g.push_unchecked(node(Op::Get(Get(0)), &[0], two()));
    g.set_output("y", NodeId(2));
    g.set_output("y", NodeId(7));
    assert_eq!(
        errors(&g),
        [
            "%1 neg (L2 mlp): operand %1 does not come before it",
            "%2 neg (L2 mlp): has type f32[3], but its operation makes f32[2]",
            "%3 neg (L2 mlp): operand %9 does not come before it",
            "%4 get (L2 mlp): no element 0 in a value of type f32[2]",
            "output 'y' is %7, but there are 5 nodes",
            "output 'y' is declared twice",
        ]
    );
}

#[test]
fn leaves_are_unique_and_consistent() {
    let g = parsed(
        "%0 = input {name=\"x\"} : f32[2]\n%1 = input {name=\"x\"} : f32[2]\n\
         %2 = input {name=\"x\"} : f32[-3]\n%3 = weight {name=\"x\"} : f32[2]\nreturn\n",
    );
    assert_eq!(
        errors(&g),
        [
            "%2 input: extent -3 is negative",
            "%1 input: input 'x' stands in the program already, as %0",
            "%2 input: input 'x' has another type at %0",
        ]
    );
}

#[test]
fn attention_is_checked() {
    let g = parsed(
        "%q = input {name=\"q\"} : f32[B,2,S,4]\n%s = input {name=\"s\"} : f32[B,2,S,S]\n\
         %0 = sdpa %s, %q {scale=1.0, causal=true, groups=2, stage=closed} : f32[B,2,S,4]\n\
         %1 = attn %q, %q, %q {scale=1.0, causal=false, groups=1, stage=mask} : f32[B,2,S,4]\n\
         %x = input {name=\"x\"} : f32[T,32]\n%p = input {name=\"p\"} : i32[T]\n\
         %f = input {name=\"f\"} : f32[4]\n\
         %c = cache {layer=0, kv_heads=1, head_dim=4} : cache\n\
         %2 = attn_qkv qkv=%x, cache=%c, positions=%p, inv_freq=%f {heads=2, kv_heads=1, head_dim=8, rope=1.0, \
         scale=1.0, causal=false, groups=1, stage=closed} : (f32[T,2,8], cache)\nreturn\n",
    );
    assert_eq!(
        errors(&g),
        [
            "%2 sdpa: an open attention must not be in stage 'closed'",
            "%2 sdpa: an open attention cannot share KV heads, but has 2 query heads a KV head",
            "%3 attn: the attention is still open",
            "%8 attn_qkv: a step must not see later keys, but its mask is not causal",
            "%8 attn_qkv: 2 query heads are not 1 KV heads times 1",
            "%8 attn_qkv: RoPE partners of heads of 8 features cannot be interleaved by 8",
            "%8 attn_qkv: works on 1 KV heads of 8, but the cache holds 1 of 4",
        ]
    );
}

#[test]
fn cache_versions_are_used_once() {
    let step = |name: &str, cache: &str| {
        format!(
            "%{name} = attn_step %q, %q, %q, %{cache} {{scale=1.0, causal=true, groups=1, \
             stage=closed}} : (f32[T,2,4], cache)\n"
        )
    };
    let head = "%q = input {name=\"q\"} : f32[T,2,4]\n\
                %c = cache {layer=0, kv_heads=2, head_dim=4} : cache\n";
    let good = format!(
        "{head}{}%d = get %a {{index=1}} : cache\n{}%e = get %b {{index=1}} : cache\nreturn e=%e\n",
        step("a", "c"),
        step("b", "d")
    );
    assert_eq!(errors(&parsed(&good)), [""; 0]);
    let bad = format!(
        "{head}{}{}%d = get %a {{index=1}} : cache\n%d2 = get %a {{index=1}} : cache\n{}{}\
         %k = cache {{layer=1, kv_heads=1, head_dim=4}} : cache\n\
         %k2 = cache {{layer=1, kv_heads=1, head_dim=4}} : cache\nreturn c=%c, d=%d\n",
        step("a", "c"),
        step("b", "c"),
        step("e", "d"),
        step("f", "d2"),
    );
    assert_eq!(
        errors(&parsed(&bad)),
        [
            "%9 cache: the cache of layer 1 stands in the program already, as %8",
            "%1 cache: this cache version is used by 2 steps, expected exactly one",
            "%2 attn_step: this cache version is used by 2 steps, expected at most one",
            "%8 cache: this cache version is used by 0 steps, expected exactly one",
            "%9 cache: this cache version is used by 0 steps, expected exactly one",
            "%1 cache: a cache that a step replaces must not be a result",
            "%4 get: a cache that a step replaces must not be a result",
        ]
    );
}
